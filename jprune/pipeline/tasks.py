"""Tasks of EleutherAI's lm-evaluation-harness, on models that need not fit into memory.

The harness makes the prompts, and of the answers the metrics; here are the three things that it asks of a model. What
it asks is the same as of its own backend for transformers, and so are the numbers: texts are tokenised as there, long
ones lose their beginning, and a text without a context begins with the token that begins texts, or ends them.
Log-likelihoods are computed for all requests together, block by block; texts are generated one after the other, with
the whole model in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jprune import texts
from jprune.checkpoints import Checkpoint
from jprune.data import chat as chats
from jprune.errors import JpruneError
from jprune.evaluate.scoring import scores
from jprune.models.continuation import Continuation
from jprune.models.generate import stream
from jprune.pipeline.options import Asking


class Model(TemplateLM):
    """A checkpoint with the face of a model of the harness.

    Args:
        checkpoint: the model, with its tokenizer.
        dtype: of parameters and hidden states in the computation.
        mesh: the devices, see `jprune.devices`.
        progress: called with (done, total) after each block.

    Raises:
        JpruneError: there is no tokenizer, or it does not say how texts end.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        if checkpoint.tokenizer is None:
            raise JpruneError(f"{checkpoint.source} has no tokenizer; put its tokenizer.json beside the weights")
        self._checkpoint, self._tokenizer = checkpoint, checkpoint.tokenizer
        self._template = chats.template(checkpoint.side_files)
        self._options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "progress": progress}
        self._ends = _special(checkpoint, "eos_token", checkpoint.eos_token_ids[:1])
        self._begins = _special(checkpoint, "bos_token", ())
        self._begins = self._ends if self._begins is None else self._begins
        if self._ends is None:
            raise JpruneError(
                f"{checkpoint.source}: expected a token that ends texts, and neither tokenizer_config.json nor the "
                "config names one; tasks need it where a text has no context"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        assert self._ends is not None
        return self._ends

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        assert self._begins is not None
        return self._begins

    @property
    def max_length(self) -> int:
        """Tokens that the model's context holds."""
        return self._checkpoint.model.context

    @property
    def tokenizer_name(self) -> str:
        """What the harness names the tokenizer by, where it keeps requests."""
        return self._checkpoint.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness notes of the template that messages are put into."""
        return f"that of {self._checkpoint.source}" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's template; if its last message is to be gone on with, up to that one's end."""
        if self._template is None:
            raise JpruneError(f"{self._checkpoint.source} has no chat template; leave --chat out")
        text = self._template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with a BOS where the tokenizer adds one and the text has none yet."""
        if add_special_tokens is None:
            begins = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (begins and string.startswith(begins))
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        whole = [[*context, *continuation][-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [len(continuation) for *_, continuation in requests]
        sums, likeliest = scores(self._checkpoint, whole, counts, **self._options)
        found = [(float(x), bool(top)) for x, top in zip(sums, likeliest, strict=True)]
        for (asked, *_), own in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, own)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, each in as few windows as the context allows."""
        del disable_tqdm
        pieces: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in windows]
            pieces += own
            owners += [index] * len(own)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the first of the strings that it is to stop at."""
        del disable_tqdm
        params = self._checkpoint.params() if requests else {}
        found = []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, 256)
            most = options["max_gen_toks"]
            if most >= self.max_length:
                raise JpruneError(f"expected fewer tokens to generate than the context's {self.max_length}, got {most}")
            answer = Continuation(self._tokenizer.decode, options.get("until") or ())
            given = self.tok_encode(context)[-(self.max_length - most) :]
            for token in stream(
                self._checkpoint.config,
                params,
                given,
                max_tokens=most,
                temperature=options.get("temperature", 0.0),
                top_p=options.get("top_p", 1.0),
                eos_id=self._checkpoint.eos_token_ids or self.eot_token_id,
            ):
                answer.add(token)
                if answer.stopped:
                    break
            found.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found


def evaluate(model: Model, tasks: Sequence[str], asking: Asking) -> Mapping[str, Any]:
    """What the harness finds: by task, its metrics and their standard errors.

    Args:
        model: what answers.
        tasks: names of the harness', or of those in `asking.include`.
        asking: how they are asked.

    Raises:
        JpruneError: there is no such task, or its data cannot be had.
    """
    result = _asked(model, tasks, asking, items=False)
    return {name: result[name] for name in ("results", "n-shot", "n-samples", "versions", "higher_is_better")}


Answers = dict[tuple[str, str, str], dict[int, bool]]
"""Of every task, metric and filter, whether each item, by its number, was right."""


def answers(model: Model, tasks: Sequence[str], asking: Asking) -> tuple[Answers, tuple[str, ...]]:
    """Which items of tasks a model has right, by the metrics that say so of each; and the tasks that have none.

    Arguments and errors are those of `evaluate`.
    """
    found: Answers = {}
    samples = _asked(model, tasks, asking, items=True)["samples"]
    for task, items in samples.items():
        for item in items:
            for metric in item["metrics"]:
                found.setdefault((task, metric, item["filter"]), {})[item["doc_id"]] = item[metric]
    right = {
        key: {number: bool(value) for number, value in values.items()}
        for key, values in found.items()
        if all(isinstance(value, bool | int | float | np.number) and value in (0, 1) for value in values.values())
    }
    return right, tuple(task for task in samples if task not in {name for name, *_ in right})


def _asked(model: Model, tasks: Sequence[str], asking: Asking, *, items: bool) -> Mapping[str, Any]:
    if asking.include is not None and not asking.include.is_dir():
        raise JpruneError(
            f"`include` is a folder with tasks as lm-evaluation-harness writes them; got {asking.include}"
        )
    manager = TaskManager(include_path=None if asking.include is None else str(asking.include))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise JpruneError(
            f"expected tasks of lm-evaluation-harness, got {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
            "`--include` adds a folder of your own"
        )
    try:
        result = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=asking.fewshot,
            limit=asking.limit,
            task_manager=manager,
            apply_chat_template=asking.chat,
            log_samples=items,
            bootstrap_iters=0 if items else 1000,
            random_seed=asking.example_seed,
            numpy_random_seed=asking.example_seed,
            torch_random_seed=asking.example_seed,
            fewshot_random_seed=asking.example_seed,
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        words = (str(error).strip().splitlines() or [""])[0]
        raise JpruneError(
            f"the data of {', '.join(tasks)} cannot be had ({type(error).__name__}: {words}); fetch it where there is "
            "a network (HF_HOME says where it is kept), or use tasks of local files with `--include`"
        ) from error
    assert result is not None
    return result


def _special(checkpoint: Checkpoint, name: str, otherwise: Sequence[int]) -> int | None:
    """The id of a special token as the tokenizer's files name it; where there are none, as the config does."""
    files = checkpoint.side_files
    if "tokenizer_config.json" not in files:
        known = checkpoint.hf_config.get(f"{name}_id")
        known = known[0] if isinstance(known, list) and known else known
        return known if isinstance(known, int) else next(iter(otherwise), None)
    token = texts.beside(files, "tokenizer_config.json").get(name)
    token = token.get("content") if isinstance(token, dict) else token
    ids = checkpoint.tokenizer.encode(token, add_special_tokens=False) if token and checkpoint.tokenizer else []
    return int(ids[0]) if len(ids) == 1 else next(iter(otherwise), None)
