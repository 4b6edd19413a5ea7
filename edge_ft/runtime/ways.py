"""How a bundle runs: which graph reads prompts and which one generates, and with how many threads."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from edge_ft.config import Minimum

__all__ = ["Engine", "Way"]


@dataclass(frozen=True)
class Way:
    """How a phase runs: a graph and CPU threads."""

    accuracy_level: Annotated[int, Minimum(1)]
    threads: Annotated[int, Minimum(1)]


@dataclass(frozen=True)
class Engine:
    """How a bundle runs."""

    prefill: Way
    decode: Way
    nll_above_exact: float | None = None
    """Validation loss of the graphs in use minus that of the exact one, in nats per target token; None: not scored."""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)
