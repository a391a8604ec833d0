"""Files of a checkpoint folder lie in it: symbolic links are not followed out of it.

A folder that was unpacked or fetched could otherwise make any file of the user's part of a result. The one layout whose
links lead out of a folder by design is Hugging Face's cache, `models--NAME/snapshots/REVISION`, and they lead to
`models--NAME/blobs`.
"""

from pathlib import Path

from jprune.errors import JpruneError


def checked(path: Path, folder: Path) -> Path:
    """The path of a file in a checkpoint folder, as it is.

    Raises:
        JpruneError: it is a link to a place outside.
    """
    if not path.is_symlink() and path.parent == folder:
        return path
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return path
    repository = root.parent.parent
    cached = root.parent.name == "snapshots" and repository.name.startswith("models--")
    if cached and real.is_relative_to(repository / "blobs"):
        return path
    raise JpruneError(
        f"{path}: a link out of its folder, to {real}, is not followed (but in Hugging Face's cache); give the folder "
        "where the file lies, or put a copy here"
    )
