"""Whose work a repository holds: nothing is overwritten that this run has not pushed."""

from collections.abc import Iterable

from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.hub_client import HubError, Remedy

POINTER = "pushed.json"
"""On each branch, who pushed last to it, and what."""
CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".onnx")
"""How the names of files end that a model's weights lie in."""


class ConflictError(HubError):
    """Another run pushes to the same repository."""

    def __init__(self, reason: str):
        super().__init__(reason, Remedy.NONE)


class UnreadablePointerError(HubError):
    """There is a pointer, and nobody can tell what it says."""


def require_no_model(repository: Repository, main: str) -> None:
    """Raise `ConflictError` if there is a model in the commit `main`."""
    weights = [name for name in repository.tree(main) if name.endswith(WEIGHTS)]
    if weights:
        raise ConflictError(
            f"{repository.id} holds a model already ({weights[0]}) that no run of qa_dist has pushed, and nothing is "
            "overwritten; name another repository"
        )


def require_free_branch(repository: Repository, branch: str, entries: Iterable[str]) -> None:
    """Raise `ConflictError` if a branch that no run has pushed to holds anything that it would lose."""
    others = sorted(set(entries) - {".gitattributes", CARD})
    if POINTER in others:
        raise UnreadablePointerError(
            f"{POINTER} on the branch {branch} of {repository.id} cannot be read", Remedy.RETRY
        )
    if others:
        raise ConflictError(
            f"the branch {branch} of {repository.id} holds {others[0]}, and is no branch of training states; name "
            "another (--hub.branch)"
        )
