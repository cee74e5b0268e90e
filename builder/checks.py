"""Whether a set of weights is exactly the expected one."""

from collections.abc import Iterable, Mapping, Sequence

NAMES_SHOWN = 20


def require_shapes(
    what: str, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> None:
    """Raises ValueError, naming what is unknown, missing or of another shape."""
    faults = [
        *_listed("unknown", found.keys() - expected.keys()),
        *_listed("missing", expected.keys() - found.keys()),
        *_listed(
            "wrong shape",
            (
                f"{name} {tuple(found[name])}, expected {tuple(expected[name])}"
                for name in expected.keys() & found.keys()
                if tuple(expected[name]) != tuple(found[name])
            ),
        ),
    ]
    if faults:
        raise ValueError(f"{what} does not fit the model: {'; '.join(faults)}")


def require_names(what: str, allowed: Iterable[str], found: Iterable[str]) -> None:
    """Raises ValueError, naming what is not allowed."""
    unknown = _listed("unknown", set(found) - set(allowed))
    if unknown:
        raise ValueError(f"{what}: {unknown[0]}")


def _listed(fault: str, names: Iterable[str]) -> list[str]:
    """One sentence for the names, none if there are none."""
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return [f"{fault}: {', '.join(ordered[:NAMES_SHOWN])}{more}"]
