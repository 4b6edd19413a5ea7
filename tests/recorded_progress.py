"""A progress display whose messages a test can read."""


class RecordedProgress:
    """Keeps the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        pass
