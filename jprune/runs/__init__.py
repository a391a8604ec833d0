"""Any long run, whatever it does: it knows no method, no pattern and no training.

- `folder`: the folder of a run: what was begun, what is done, what grows; locked, resumed, removed
- `lock`: one process at a time in a folder
- `output`: the folder of the result, which appears whole or not at all
- `activations`: what lies between the parts of a model: in memory, on disk, and checked when it is read back
- `background`: one thread that reads ahead and writes behind
- `processes`: several processes of one run: who decides, who writes, how they fail together
- `interrupt`: Ctrl-C that waits for a safe point
- `failures`: what a run says when it fails, and what is kept of it
- `memory`: how much memory there is
- `remembered`: the perplexity of the demo model before pruning, measured once on a machine
- `stopwatch`: where the seconds go, and the most memory that was taken
- `report`: what a run tells: its progress, and what all reports and records have
"""
