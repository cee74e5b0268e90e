"""What was loaded, and how fast."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ComponentLoad:
    """When one component was there."""

    name: str
    num_bytes: int  # on the disk
    ready_seconds: float  # from the start of the load until its last byte was read


@dataclass(frozen=True)
class LoadReport:
    """The load of a model directory."""

    components: tuple[ComponentLoad, ...]
    num_bytes: int  # on the disk
    cached_bytes: int  # of these, in the page cache
    seconds: float  # of reading; before, the disk is measured and the tokenizers are read
    disk_bytes_per_second: float | None  # measured just before; None: too little to measure it

    @property
    def bytes_per_second(self) -> float:
        """The throughput of the load."""
        return self.num_bytes / self.seconds

    @property
    def disk_ratio(self) -> float | None:
        """The same as a share of the disk's throughput; over 1 where the page cache helped."""
        disk_speed = self.disk_bytes_per_second
        return None if disk_speed is None else self.bytes_per_second / disk_speed

    def __str__(self) -> str:
        speed = f"{self.bytes_per_second / 1e9:.2f} GB/s"
        if self.disk_bytes_per_second is not None:
            disk_speed = self.disk_bytes_per_second / 1e9
            speed += f", {self.disk_ratio:.2f} of the disk's {disk_speed:.2f} GB/s"
        ready = ", ".join(f"{part.name} {part.ready_seconds:.1f} s" for part in self.components)
        return (
            f"{self.num_bytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed}, "
            f"{self.cached_bytes / self.num_bytes:.0%} from the page cache; ready: {ready}"
        )
