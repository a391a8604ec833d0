"""How calibration is cut up: what decides the last bits of the result, apart from the inputs."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Chosen when a run begins and kept when it is resumed, whatever memory there is then."""

    windows: int
    """Calibration windows in a micro-batch."""
    carry_limit: int | None = None
    """Bytes that the values between two stages may take over all micro-batches. Where they would take more they are
    recomputed from the last that were kept. None: they are always kept, in memory or on disk."""

    def keeps(self, nbytes: int) -> bool:
        """Whether values between two stages that take `nbytes` are kept."""
        return self.carry_limit is None or nbytes <= self.carry_limit
