"""Models from the Hugging Face hub, or from its cache."""

from pathlib import Path

from jprune.checkpoints import beside
from jprune.checkpoints.source import reason
from jprune.errors import JpruneError
from jprune.packages import require


def download(repo_id: str, *, weights: bool = True) -> Path:
    """Fetches a model from the Hugging Face hub (or finds it in the hub's cache) and returns its folder.

    Without `weights` only what lies beside them is fetched.

    Raises:
        JpruneError: no such model, no permission, or no network and not in the cache.
    """
    require("huggingface_hub")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            allow_patterns=[
                *(("*.safetensors", "*.index.json") if weights else ()),
                "config.json",
                "adapter_config.json",
                *beside.PATTERNS,
                beside.CODE,
            ],
            # Other copies of the same weights, in subfolders or under Mistral's own names.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except errors.GatedRepoError as error:
        raise JpruneError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id} and run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise JpruneError(
            f"{repo_id!r} is neither a local file or folder nor a model on huggingface.co "
            "(if it is a private one, run `hf auth login`)"
        ) from error
    except Exception as error:  # the hub's own kinds, and those of whatever HTTP library it uses
        raise JpruneError(
            f"{repo_id} is not in the local cache and cannot be fetched from huggingface.co ({reason(error)}); "
            "connect to the network, or give a local folder"
        ) from error
    return Path(folder)
