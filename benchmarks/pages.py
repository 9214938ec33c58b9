"""Pages with a table that a command writes between two marks."""

END = "<!-- end -->\n"


def mark_of(module: str) -> str:
    """Returns the first mark of the table that a module of the benchmarks writes."""
    return f"<!-- benchmarks/{module}.py -->\n"


def written(text: str, module: str, table: str) -> str:
    """Returns a page's text with a module's table between the marks."""
    before, mark, rest = text.partition(mark_of(module))
    _, end, after = rest.partition(END)
    return f"{before}{mark}\n{table}\n{end}{after}"
