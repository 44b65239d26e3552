"""The one error of the data room."""


class DataError(ValueError):
    """Text or token files that cannot be used: what is wrong, where, and what to do about it."""

    def __init__(self, what: str, where: str, mend: str) -> None:
        super().__init__(f"{what}\n  where: {where}\n  mend:  {mend}")
        self.what = what
        self.where = where
        self.mend = mend
