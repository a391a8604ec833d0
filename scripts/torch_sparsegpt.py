"""The baseline of the benchmarks: SparseGPT in plain PyTorch, as its paper and published program describe it.

Frantar and Alistarh 2023 (https://arxiv.org/abs/2301.00774): the Gram matrix of every linear layer by itself, inverse
and its Cholesky factor formed, columns pruned in a Python loop, and every decoder layer run twice a window: once to
gather statistics, once more with its pruned weights. Written for comparison only; jprune does not use it.
"""

import time

import torch


@torch.no_grad()
def prune_kernel(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float = 0.5,
    prune_n: int = 0,
    prune_m: int = 0,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[torch.Tensor, float]:
    """New weights [out, in] and the loss; zeroes `prune_n` of every `prune_m` inputs, or the given share."""
    weight, gram = weight.clone().float(), gram.clone()
    dead = torch.diag(gram) == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    diagonal = torch.arange(gram.shape[0])
    gram[diagonal, diagonal] += damping * torch.diag(gram).mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    loss = torch.zeros(())
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        block = weight[:, start:end].clone()
        square = factor[start:end, start:end]
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not prune_n:
            score = block**2 / torch.diag(square) ** 2
            mask = score <= torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
        for i in range(end - start):
            if prune_n and i % prune_m == 0:
                score = block[:, i : i + prune_m] ** 2 / torch.diag(square)[i : i + prune_m] ** 2
                mask.scatter_(1, i + torch.topk(score, prune_n, dim=1, largest=False)[1], True)
            column = block[:, i]
            kept = torch.where(mask[:, i], 0.0, column)
            error = (column - kept) / square[i, i]
            pruned[:, i] = kept
            loss += 0.5 * (error**2).sum()
            block[:, i:] -= torch.outer(error, square[i, i:])
            errors[:, i] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight, loss.item()


@torch.no_grad()
def prune_model(folder: str, tokens, sparsity: float = 0.5, **options) -> tuple[torch.nn.Module, dict[str, float]]:
    """Prunes a LLaMA-like Hugging Face model in memory with windows of token ids; returns it and seconds by phase."""
    from transformers import AutoModelForCausalLM

    seconds = {"load": 0.0, "calibration": 0.0, "solve": 0.0}
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    seconds["load"] = time.perf_counter() - start
    windows = torch.tensor(tokens, dtype=torch.long)
    inner = model.model
    start = time.perf_counter()
    hidden = [inner.embed_tokens(window[None]) for window in windows]
    positions = torch.arange(windows.shape[1])[None]
    rotary = inner.rotary_emb(hidden[0], positions)

    def run(layer, x):
        out = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    for layer in inner.layers:
        start = time.perf_counter()
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        grams = {m: torch.zeros(m.in_features, m.in_features) for m in linears}

        def add(module, inputs, output, grams=grams):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            grams[module].addmm_(x.T, x)

        hooks = [m.register_forward_hook(add) for m in linears]
        for x in hidden:
            run(layer, x)
        for hook in hooks:
            hook.remove()
        seconds["calibration"] += time.perf_counter() - start
        start = time.perf_counter()
        for module in linears:
            module.weight.data = prune_kernel(module.weight, grams[module], sparsity, **options)[0]
        seconds["solve"] += time.perf_counter() - start
        start = time.perf_counter()
        hidden = [run(layer, x) for x in hidden]
        seconds["calibration"] += time.perf_counter() - start
    return model, seconds


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens) -> float:
    """exp of the mean over windows of the mean cross-entropy."""
    windows = torch.tensor(tokens, dtype=torch.long)
    losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:]).item() for w in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
