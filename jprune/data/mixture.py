"""Batches drawn from several domains by weights that may change on the way.

Each row of a batch draws its domain, and takes that domain's next window. The draws follow from the seed, the number of
the batch and the weights alone; the windows of a domain come in a permutation that is another one in each of its epochs
(grain's, as in `jprune.data.batches`), so none is repeated before all of that domain were seen. The place in the stream
is the number of the batch, how many windows each domain has given, and the weights: resuming costs nothing and gives
exactly the batches that were left. A domain that has given all its windows begins its next epoch; LLM-Shearing's
program, which first drew by domains like this, ends with an error there.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jprune.annotations import Int
from jprune.data import windows
from jprune.data.batches import Batches, Examples
from jprune.data.stream import Batch, Stream, check_place
from jprune.errors import JpruneError
from jprune.packages import require

HELD_OUT_SHARE = 20
"""By default one window in this many is held out of a domain."""
HELD_OUT_AT_MOST = 256


class Part:
    """Some windows of others, by their numbers."""

    def __init__(self, whole: Examples, numbers: Int[np.ndarray, "n"]):
        self._whole, self._numbers = whole, numbers
        self.length = whole.length
        self.sha256 = hashlib.sha256(whole.sha256.encode() + numbers.astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, indices: Int[np.ndarray, "b"]) -> Batch:
        """The windows of these numbers, counted within the part."""
        return self._whole.take(self._numbers[indices])


def hold_out(domain: Batches, count: int | None = None, *, batch_size: int = 1) -> tuple[Batches, Batches]:
    """A domain without some of its windows, and those as batches to evaluate on: evenly spaced, in their order.

    Args:
        domain: the whole.
        count: how many; by default one in 20, at least one and at most 256.
        batch_size: of the windows held out.

    Raises:
        JpruneError: nothing would be left to train on.
    """
    n = domain.windows
    if count is None:
        count = min(max(1, n // HELD_OUT_SHARE), HELD_OUT_AT_MOST)
    windows.check_count("number of windows held out", count)
    if count >= n:
        raise JpruneError(
            f"{domain.source}: it has {n} windows, and {count} held out to evaluate on leave none to train on. Give "
            "more data, shorter windows, or other data to evaluate on."
        )
    kept = np.ones(n, bool)
    kept[(2 * np.arange(count) + 1) * n // (2 * count)] = False
    rest, held = (Part(domain.examples, np.flatnonzero(chosen)) for chosen in (kept, ~kept))
    evaluation = replace(domain, examples=held, batch_size=batch_size, epochs=1, shuffle=False, notices=())
    return replace(domain, examples=rest), evaluation


@dataclass(frozen=True, kw_only=True)
class Mixture(Stream):
    """A stream of batches without end over several domains; every `iter()` starts at its beginning.

    Attributes:
        domains: the windows of each, by name; of these `Batches` only the examples, source and notices count.
        proportions: the weights to begin with, one for every domain; they need not sum to 1. By default the numbers of
            windows, as if the domains were one.

    Raises:
        JpruneError: windows of different lengths, proportions that are not those of the domains, or numbers that do not
            fit together.
    """

    domains: Mapping[str, Batches]
    proportions: Mapping[str, int | float] | None = None

    def __post_init__(self) -> None:
        if not self.domains:
            raise JpruneError("a mixture needs at least one domain; there is none")
        super().__post_init__()
        lengths = {name: domain.length for name, domain in self.domains.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{length} ({name})" for name, length in lengths.items())
            raise JpruneError(
                f"the domains' windows must have one length, and have {found} tokens; give `sequence_length`"
            )
        self.initial  # noqa: B018  raises if they do not fit

    @property
    def initial(self) -> dict[str, float]:
        """The weights to begin with; they sum to 1."""
        sizes = {name: float(domain.windows) for name, domain in self.domains.items()}
        return normalised(sizes if self.proportions is None else self.proportions, self.domains)

    @property
    def windows(self) -> int:
        """How many windows there are in all domains."""
        return sum(domain.windows for domain in self.domains.values())

    @property
    def length(self) -> int:
        """Tokens a window."""
        return next(iter(self.domains.values())).length

    @property
    def per_epoch(self) -> int:
        """Batches that take as many windows as there are."""
        return max(1, self.windows // self.batch_size)

    @property
    def source(self) -> str:
        """The domains and their specs, for messages."""
        return ", ".join(f"{name}={domain.source}" for name, domain in self.domains.items())

    @property
    def notices(self) -> tuple[str, ...]:
        """The notices of all domains."""
        return tuple(notice for domain in self.domains.values() for notice in domain.notices)

    @property
    def sha256(self) -> str:
        """Hash of the names and windows of the domains."""
        content = [[name, domain.sha256] for name, domain in self.domains.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Equal for streams that give the same global batches under the same weights."""
        return hashlib.sha256(json.dumps([self.sha256, self.batch_size, self.seed]).encode()).hexdigest()

    def __iter__(self) -> "MixtureIterator":
        return MixtureIterator(self)


class MixtureIterator(Iterator[Batch]):
    """Goes through a `Mixture`; knows its place, and can be set to another one.

    `weights` may be set between two batches. `taken` counts the windows that each domain has given.
    """

    def __init__(self, mixture: Mixture):
        require("grain")
        import grain

        self._mixture = mixture
        self._weights = mixture.initial
        self._batch = 0
        self.taken = dict.fromkeys(mixture.domains, 0)
        self._orders = {
            name: grain.MapDataset.range(domain.windows).shuffle(seed=(mixture.seed + i) % 2**32).repeat()
            for i, (name, domain) in enumerate(mixture.domains.items())
        }

    @property
    def weights(self) -> dict[str, float]:
        """By which the next rows draw their domains; they sum to 1."""
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: Mapping[str, int | float]) -> None:
        self._weights = normalised(weights, self._mixture.domains)

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain was gone through."""
        return {name: self.taken[name] / domain.windows for name, domain in self._mixture.domains.items()}

    def __next__(self) -> Batch:
        mixture = self._mixture
        mine, batch = mixture.mine, mixture.blank(mixture.length)
        drawn = np.random.default_rng((mixture.seed, self._batch)).choice(
            len(mixture.domains), size=mixture.batch_size, p=list(self._weights.values())
        )
        for i, (name, domain) in enumerate(mixture.domains.items()):
            of_domain = drawn == i
            # Every process counts the rows of all, and reads its own.
            numbers = self.taken[name] + np.cumsum(of_domain)[mine] - 1
            here = np.flatnonzero(of_domain[mine])
            if len(here):
                order = self._orders[name]
                taken = domain.examples.take(np.array([order[int(number)] for number in numbers[here]]))
                for key, rows in taken.items():
                    batch[key][here] = rows
            self.taken[name] += int(of_domain.sum())
        self._batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place in the stream and the weights, as something that JSON can hold."""
        return {
            "data": self._mixture.fingerprint,
            "batch": self._batch,
            "taken": dict(self.taken),
            "weights": dict(self._weights),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `get_state` gave, also of another process or another run.

        Raises:
            JpruneError: the place is in a stream of other data, another batch size or another seed.
        """
        check_place(state, fingerprint=self._mixture.fingerprint, source=self._mixture.source)
        names = list(self._mixture.domains)
        self._batch = int(state["batch"])
        self.taken = {name: int(state["taken"][name]) for name in names}
        self._weights = {name: float(state["weights"][name]) for name in names}  # not rounded anew


def normalised(
    weights: Mapping[str, int | float], domains: Iterable[str], *, what: str = "proportions"
) -> dict[str, float]:
    """The weights in the order of the domains, made to sum to 1; `what` they are is for messages.

    Raises:
        JpruneError: a name that is no domain's, a domain without a weight, or a weight that is none.
    """
    domains = list(domains)
    check_names(what, weights, domains)
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise JpruneError(f"the proportion of domain {name!r} must be a number of 0 or more; it is {weight}")
    total = sum(weights.values())
    if total <= 0:
        raise JpruneError("the proportions of all domains are 0; at least one must be above")
    return {name: float(weights[name] / total) for name in domains}


def check_names(what: str, given: Iterable[str], domains: Iterable[str]) -> None:
    """An error when names are not those of the domains, each and no others."""
    given, domains = list(given), list(domains)
    check_known(what, given, domains)
    missing = [name for name in domains if name not in given]
    if missing:
        raise JpruneError(f"{what}: none is given for {', '.join(map(repr, missing))}; every domain needs one")


def check_known(what: str, given: Iterable[str], domains: Iterable[str]) -> None:
    """An error when a name is no domain's."""
    domains = list(domains)
    for name in given:
        if name not in domains:
            raise JpruneError(f"{what}: {name!r} is no domain of the data; there are {', '.join(domains)}")
