"""``hyperlearn data``: the data sets, and where each was found."""

from __future__ import annotations

from typing import Annotated

import typer

from hyperlearn.cli.app import app, new_console, new_table, user_errors


@app.command()
def data(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the checksum of each file.")
    ] = False,
) -> None:
    """List the data sets: size, source, licence, and where each was found."""
    with user_errors():
        from hyperlearn import datasets

        rows = datasets.describe(verify=verify)
        table = new_table()
        columns = ["source", "licence", "found", *(["checksum"] if verify else [])]
        for heading in ("name", "size", *columns):
            table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "size"))
        for row in rows:
            size = f"{int(row['size_bytes']) / 1e6:.1f} MB"
            table.add_row(str(row["name"]), size, *(str(row[column]) for column in columns))
        new_console().print(table)
        wrong = [f"{row['name']} ({row['found']})" for row in rows if row["checksum"] == "wrong"]
        if wrong:
            raise ValueError(f"wrong checksum: {', '.join(wrong)}; replace the file")
