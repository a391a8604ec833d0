"""What is typed: commands that write, commands that tell, and calls that are wrong.

{name} stands for a path: of an input, or of what the run of that name wrote, its blanks as underscores.
"""

_UNCUT = "--protect-first 0 --protect-last 0"
_STEPS = "--steps 3 --batch-size 4 --micro-batch 4"
RUNS: dict[str, str] = {
    "magnitude": "prune magnitude {model} --sparsity 0.5",
    "magnitude 2:4": "prune magnitude {model} --pattern 2:4",
    "wanda": "prune wanda {model} --sparsity 0.5 --calibration {tokens}",
    "wanda 2:4": "prune wanda {model} --pattern 2:4 --calibration {tokens}",
    "sparsegpt": "prune sparsegpt {model} --sparsity 0.5 --calibration {tokens} --evaluate {held_out}",
    "sparsegpt 2:4": "prune sparsegpt {model} --pattern 2:4 --calibration {tokens}",
    "sparsegpt --keep-zeros": "prune sparsegpt {magnitude} --sparsity 0.7 --keep-zeros --where mlp"
    " --calibration {tokens}",
    "sparsegpt, kernel by kernel": "prune sparsegpt {model} --sparsity 0.3 --per kernel --override mlp/down=2:4"
    " --override attn/o=0.6 --skip attn/[kv] --skip blocks/0/attn --block-size 16 --dtype bfloat16"
    " --calibration {tokens}",
    "sparsegpt from its record": "prune sparsegpt {model} --recipe {sparsegpt}/jprune.json",
    "admm --refit": "prune admm {model} --pattern 2:4 --refit 3 --iterations 8 --calibration {tokens}",
    "alps": "prune alps {model} --sparsity 0.6 --where mlp --calibration {tokens}",
    "auto": "prune auto {model} --sparsity 0.5 --quality fast --calibration {tokens}",
    "llm-pruner": "prune llm-pruner {model} --ratio 0.5 --protect-first 1 --protect-last 0 --calibration {tokens}"
    " --taylor param_first --evaluate {held_out} --no-compensate",
    "llm-pruner by both orders": "prune llm-pruner {model} --ratio 0.5 --taylor param_mix --uniform"
    " --calibration {tokens} --no-compensate",
    "llm-pruner, refitted": "prune llm-pruner {model} --ratio 0.5 --taylor l2 --uniform --calibration {tokens}"
    " --evaluate {held_out}",
    "llm-pruner, channels": "prune llm-pruner {model} --mode channel --ratio 0.25 --taylor param_first"
    " --calibration {tokens}",
    "layers": "prune layers {model} --drop 1 --calibration {tokens} --evaluate {held_out}",
    "tune lora": f"tune lora {{magnitude}} --data {{rows}} {_STEPS} --rank 2",
    "tune lora --keep-adapters": f"tune lora {{model}} --data {{rows}} {_STEPS} --rank 2 --targets q,v --keep-adapters",
    "tune full": f"tune full {{magnitude}} --data {{rows}} {_STEPS} --evaluate {{held_out}} --evaluate-every 2",
    "tune full --teacher": f"tune full {{magnitude}} --data {{rows}} {_STEPS} --teacher {{model}}",
    "loraprune": f"prune loraprune {{model}} --ratio 0.5 {_UNCUT} --every 1 --data {{rows}} {_STEPS} --rank 2",
    "loraprune --sparsity": f"prune loraprune {{model}} --sparsity 0.5 --every 1 --dropout 0 --data {{rows}} {_STEPS}"
    " --rank 2",
    "shearing": "prune shearing {model} --target layers=2,intermediate=24 --data a={rows} --data b={other_rows}"
    f" --dynamic-loading --reference-loss a=4.5,b=4.6 --evaluate-every 1 {_STEPS}",
    "prune-and-tune": f"prune prune-and-tune {{model}} --sparsity 0.5 --rounds 0.25,0.5 --data {{rows}} {_STEPS}"
    " --tune-length 12 --calibration {tokens} --evaluate {held_out}",
    "prune-and-tune, adapters": "prune prune-and-tune {model} --sparsity 0.5 --rounds 0,0.5 --pruner magnitude"
    f" --tuning lora --rank 2 --data {{rows}} {_STEPS} --tune-length 12 --keep-rounds",
    "convert": "convert {model} --dtype bfloat16",
    "convert to jprune": "convert {model} --format jprune",
    "convert to decilm": "convert {model} --format decilm",
    "convert to orbax": "convert {model} --format orbax",
    "convert from orbax": "convert {convert_to_orbax}",
    "pack": "pack {magnitude}",
    "convert from packed": "convert {pack}",
    "convert from jprune": "convert {llm-pruner} --format jprune --dtype float16",
}
"""Commands that write a model, less --out and --json. A {name} that is a run's stands for what that run wrote."""

SAYS: dict[str, str] = {
    "eval perplexity": "eval perplexity {model} --text {held_out}",
    "compare": "compare {model} {magnitude} --text {held_out}",
    "generate": "generate {model} --prompt 'w5 w6 w7' --max-tokens 6",
    "info": "info {wanda_2:4}",
    "groups": "groups {model}",
    "prune magnitude --plan": "prune magnitude {model} --sparsity 0.5 --where mlp --plan",
    "prune wanda --plan": "prune wanda {model} --sparsity 0.5 --where mlp --calibration {tokens} --plan",
    "prune sparsegpt --plan": "prune sparsegpt {model} --pattern 2:4 --where mlp --calibration {tokens} --plan",
    "prune auto --plan": "prune auto {model} --sparsity 0.5 --quality fast --where mlp --calibration {tokens} --plan",
    "prune admm --plan": "prune admm {model} --sparsity 0.5 --where mlp --calibration {tokens} --plan",
    "prune alps --plan": "prune alps {model} --pattern 2:4 --where mlp --calibration {tokens} --plan",
    "prune prune-and-tune --plan": f"prune prune-and-tune {{model}} --sparsity 0.5 {_STEPS} --where mlp"
    " --calibration {tokens} --plan",
    "prune llm-pruner --plan": f"prune llm-pruner {{model}} --ratio 0.5 {_UNCUT} --calibration {{tokens}} --plan",
    "prune llm-pruner --global --plan": f"prune llm-pruner {{model}} --ratio 0.5 --global {_UNCUT} --no-compensate"
    " --plan",
    "prune layers --plan": "prune layers {model} --drop 1 --plan",
    "prune loraprune --plan": f"prune loraprune {{model}} --ratio 0.5 {_UNCUT} --plan",
    "prune shearing --plan": "prune shearing {model} --target layers=2,intermediate=24 --plan",
}
"""Commands that write nothing, less --json."""

ELSEWHERE = {
    "eval tasks": "needs a package that is not always there: tests/faults/test_tasks.py types it",
    "sweep": "runs of `prune` and `compare`, which are pinned: tests/runs/cli/test_sweep.py types it",
    "prune experts": "needs a model with experts: tests/runs/cli/test_shrink.py types it",
}
"""Commands of which no run is pinned, and why."""

CALLS: list[str] = [
    "",
    "--help",
    "help",
    "-h",
    "prune",
    "prune --help",
    "tune",
    "tune --help",
    "eval",
    "eval --help",
    "nonsense",
    "prune nonsense",
    "tune nonsense",
    "eval nonsense",
    "--version",
    "info",
    "info {model} surplus",
    "info {model} --nonsense",
    "info {missing}",
    "info {empty}",
    "groups {missing}",
    "generate {model}",
    "generate {no_tokenizer} --prompt w1",
    "generate {model} --prompt w1 --top-p 0",
    "generate {model} --prompt w1 --max-tokens 0",
    "convert {model}",
    "convert {model} --out {here}/no --format nonsense",
    "convert {model} --out {here}/no --dtype nonsense",
    "convert {llm-pruner} --out {here}/no --format hf",
    "convert {model} --out {magnitude}",
    "convert {model} --out {model} --overwrite",
    "eval perplexity {model} --text {missing}",
    "eval perplexity {model} --text {held_out} --sequence-length 65",
    "eval perplexity {model} --text {held_out} --model-axis 3",
    "eval perplexity {model} --text {held_out} --distributed --coordinator localhost:1",
    "prune magnitude {model} --sparsity 0.5",
    "prune magnitude {model} --out {here}/no",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --pattern 2:4",
    "prune magnitude {model} --out {here}/no --sparsity 1",
    "prune magnitude {model} --out {here}/no --sparsity -0.1",
    "prune magnitude {model} --out {here}/no --sparsity x",
    "prune magnitude {model} --out {here}/no --pattern 0.5",
    "prune magnitude {model} --out {here}/no --pattern 4:2",
    "prune magnitude {model} --out {here}/no --pattern 2:4 --per output",
    "prune magnitude {model} --out {here}/no --pattern 3:5",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --where nothing",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --where (",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --override mlp",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --memory much",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --recipe {missing}",
    "prune magnitude {model} --out {here}/no --recipe {sparsegpt}/jprune.json",
    "prune magnitude {model} --out {magnitude} --sparsity 0.5",
    "prune magnitude {magnitude} --out {here}/no --sparsity 0.5 --format nonsense",
    "prune magnitude {missing} --out {here}/no --sparsity 0.5",
    "prune magnitude {model} --out {here}/no --sparsity 0.5 --damping 0.1",
    "prune wanda {model} --out {here}/no --sparsity 0.5 --calibration {missing}",
    "prune sparsegpt {model} --out {here}/no --sparsity 0.5 --calibration {tokens} --damping -1",
    "prune prune-and-tune {model} --sparsity 0.5 --out {here}/no",
    "prune prune-and-tune {model} --sparsity 0.5 --data {rows}",
    "prune prune-and-tune {model} --data {rows} --out {here}/no",
    "prune prune-and-tune {model} --sparsity 0.5 --rounds 0.2,x --data {rows} --out {here}/no",
    "prune prune-and-tune {model} --sparsity 0.5 --rounds 0.2,0.4 --data {rows} --out {here}/no",
    "prune prune-and-tune {model} --sparsity 0.5 --pruner nonsense --data {rows} --out {here}/no",
    "prune prune-and-tune {model} --sparsity 0.5 --pruner wanda --damping 0.1 --data {rows} --out {here}/no",
    "prune llm-pruner {model} --ratio 0.5",
    "prune llm-pruner {model} --out {here}/no",
    "prune llm-pruner {model} --out {here}/no --ratio 0.5",
    "prune llm-pruner {model} --out {here}/no --ratio 1.5",
    "prune llm-pruner {model} --out {here}/no --ratio 0.5 --parameters 100",
    "prune layers {model} --out {here}/no",
    "prune layers {model} --out {here}/no --drop 3",
    "prune experts {model} --out {here}/no",
    "prune experts {model} --out {here}/no --remove 1",
    "prune loraprune {model} --ratio 0.5 --data {rows}",
    "prune loraprune {model} --ratio 0.5 --out {here}/no",
    "prune loraprune {model} --data {rows} --out {here}/no",
    "prune shearing {model} --target layers=2 --data {rows}",
    "prune shearing {model} --data {rows} --out {here}/no",
    "prune shearing {model} --target hidden=64 --data {rows} --out {here}/no",
    "tune lora {model} --data {rows}",
    "tune lora {model} --out {here}/no",
    "tune lora {model} --data {rows} --out {here}/no --targets nonsense",
    "tune lora {model} --data {rows} --data {rows} --out {here}/no",
    "tune lora {model} --data {rows} --reference-loss a=1 --out {here}/no",
    "tune full {model} --data {rows} --out {here}/no --hidden-loss 1",
    "tune full {model} --data {rows} --out {here}/no --steps 0",
    "tune full {model} --data {rows} --out {here}/no --batch-size 4 --teacher {missing}",
]
"""Calls, most of them wrong, whose exit status is pinned."""

HELP_OF_PARTS = [
    "--pruner wanda --tuning full",
    "--pruner magnitude --tuning full",
    "--pruner sparsegpt --tuning lora",
]
"""`prune-and-tune` has the options of its two parts; without these words, those of its defaults."""
