"""Images that cannot be read: counted, listed, and an error beyond a limit; none is dropped silently."""

from dataclasses import dataclass, field

from pipeline.params import InputError


class CorruptImageError(InputError):
    """One image of a source cannot be read. `where` names it, `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}; repair or remove it")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type["CorruptImageError"], tuple[str, str]]:
        return CorruptImageError, (self.where, self.reason)  # it travels between processes


@dataclass
class Corrupt:
    """The images that one stream leaves out. `rows` are their rows in the source."""

    limit: int = 0
    rows: list[int] = field(default_factory=list)
    found: list[CorruptImageError] = field(default_factory=list)

    def add(self, row: int, image: CorruptImageError) -> None:
        """Note one image.

        Raises:
            InputError: there are more than `limit`.
        """
        self.rows.append(row)
        self.found.append(image)
        if len(self.found) > self.limit:
            more = f" and {len(self.found) - 1} more before it" if self.limit else ""
            raise InputError(
                f"{image.where}: {image.reason}{more}; repair or remove it, or raise max_corrupt (now {self.limit})"
            )

    def listed(self) -> list[dict[str, str | int]]:
        """For the file beside the images: source row, name and reason of each."""
        return [
            {"source_row": row, "image": image.where, "reason": image.reason}
            for row, image in zip(self.rows, self.found, strict=True)
        ]
