"""What a run file holds, part by part: for people who read it without this library.

`PARTS`, `VALUES` and `VALUE_ATTRIBUTES` are compared with real runs by the tests, so that they lack
nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from hyperlearn.certificate import Certificate
from hyperlearn.runs.guarded import FORMAT, SCHEMA


@dataclass(frozen=True)
class Part:
    """A group, a dataset or an attribute.

    Parameters
    ----------
    path
        Its place; ``<metric>`` and the like stand for any name, ``@`` precedes an attribute.
    dtype
        ``"group"``, or the type of its numbers.
    shape
        Of a dataset; empty for what has none.
    meaning
        In a sentence.
    """

    path: str
    dtype: str
    shape: str
    meaning: str

    def matches(self, path: str) -> bool:
        """Whether a place in a file is this part.

        Examples
        --------
        >>> Part("history/<metric>", "float64", "(capacity,)", "").matches("history/outer_loss")
        True
        """
        pattern = re.sub(r"<\w+>", "[^/@]+", re.escape(self.path))
        return re.fullmatch(pattern, path) is not None


# Those of the tables' columns that HDF5's own convention for the axes of a plot asks for.
_SCALES = "step, seconds, oracle_calls"
_ANY = "float64, int64, bool or text of a fixed length (UTF-8)"

PARTS = (
    Part("@format", "text", "", f"Always {FORMAT!r}."),
    Part("@schema", "int64", "", f"Version of this description: {SCHEMA}."),
    Part("@id", "text", "", "A random name; it stays when the file is renamed or the run resumed."),
    Part(
        "@status",
        "text",
        "",
        "finished, running, interrupted, diverged, failed or recovered. A run that was killed "
        "still says running, but nobody holds a lock on <file>.lock.",
    ),
    Part("@message", "text", "", "Why it ended."),
    Part("@created", "text", "", "When it began, ISO 8601, UTC."),
    Part(
        "config", "group", "", "Settings: problem, method, budget, every, ...; values, see below."
    ),
    Part("environment", "group", "", "Seed, versions, threads, revision; values."),
    Part("units", "group", "", "Unit of each metric that has one; values."),
    Part("attachments", "group", "", "Arrays and fields that the experiment stored; values."),
    Part("result", "group", "", "Final outer and inner variable, x and y; values. Empty before."),
    Part("<tree>@kind", "text", "", "dict: of config, environment, units, attachments, result."),
    Part("history", "group", "", "Table of the records, a dataset a metric."),
    Part(
        "history/<metric>",
        _ANY,
        "(capacity,)",
        "The metric in each record. Only the first records/history entries count.",
    ),
    Part("certificates", "group", "", "Table of the certificates, a dataset a field."),
    Part(
        "certificates/<field>",
        _ANY,
        "(capacity,)",
        "Fields of a hypergradient's certificate, and step; NaN for what was not measured. Only "
        "the first records/certificates entries count.",
    ),
    Part("<table>/<column>@units", "text", "", "Unit; empty for none."),
    Part(
        "<table>/<column>@DIMENSION_LIST",
        "references",
        "",
        f"HDF5's dimension scales: the axes of a plot ({_SCALES}) of this table.",
    ),
    Part("<table>/<column>@CLASS", "text", "", f"DIMENSION_SCALE, of {_SCALES}."),
    Part("<table>/<column>@NAME", "text", "", "Name of the scale."),
    Part(
        "<table>/<column>@REFERENCE_LIST", "references", "", "Datasets that the scale belongs to."
    ),
    Part("records", "group", "", "Lengths of the tables."),
    Part("records/history", "int64", "()", "Records that count; written last, after each record."),
    Part("records/certificates", "int64", "()", "Certificates that count."),
    Part("integrity", "group", "", "Checksums of records in the open tails of the tables."),
    Part(
        "integrity/<table>",
        "uint32",
        "(capacity - first,)",
        "CRC-32 of each record from `first` on: the bytes of its columns, in their order.",
    ),
    Part(
        "integrity/<table>@first",
        "int64",
        "",
        "Records before this one are in chunks with HDF5's own checksums (Fletcher).",
    ),
    Part("checkpoints", "group", "", "What a run can be resumed from."),
    Part("checkpoints/<step>", "group", "", "State after so many outer steps; values."),
    Part("checkpoints/<step>@history", "int64", "", "Records that a resumed run starts from."),
    Part("checkpoints/<step>@certificates", "int64", "", "Certificates, likewise."),
)

# What holds values, anything that settings or results may be.
TREES = ("config", "environment", "units", "attachments", "result", "checkpoints/<step>")
# How a value is stored, by its attribute kind.
VALUES = {
    "(plain)": "a number, truth value or text: an attribute of its group, int64, float64, bool or "
    "text; None: an attribute without a value (an HDF5 null dataspace)",
    "dict": "a group; its keys in their order, a slash in one written %2F",
    "object": "a group of the fields of a dataclass, whose name is the attribute class",
    "list": "a group, with members 000000, 000001, ...; of more than 8 numbers a dataset",
    "tuple": "the same",
    "tensor": "a dataset; the attribute dtype is that of PyTorch (bfloat16 is stored as float32)",
    "array": "a dataset",
    "text": "a dataset of uint8: the UTF-8 of text that has more than 16000 bytes or a zero",
    "field": "a group: the dataset values, and one for each coordinate, all with the attribute "
    "units; the attribute coordinates has their names in the order of the axes, a line each; they "
    "are dimension scales",
}
# What the attributes of a value mean, where they are not values themselves.
VALUE_ATTRIBUTES = {
    "kind": "see above; a key called so is stored as %6bind",
    "class": "name of an object's class; a key called so is stored as %63lass",
    "dtype": "of a tensor",
    "crc32": "CRC-32 of the bytes of a scalar, over which HDF5 has no checksum",
    "coordinates": "of a field",
    "units": "of the datasets of a field; empty for none",
}

NOTES = (
    "Capacity. A table of a run that goes on or was killed is longer than its records: there is "
    "room for more. What follows the first records/<table> entries is NaN, -1, False or empty "
    "text, or a record that was not finished: never read it. In a run that has ended the tables "
    "end with the last record.",
    "Chunks. 512 records each; all but the open tail are compressed (gzip, shuffle) and have a "
    "checksum. No links, no external files, no other filters: this library refuses to read them.",
    "Text. Attributes and datasets of text are UTF-8 of a fixed length, filled up with zeros.",
    "Order. HDF5 stores rows first; MATLAB and Julia show the axes of arrays in reverse.",
)

READING = {
    "Python, this library": """\
import hyperlearn as hl
run = hl.load_run("run.h5")
run.status, run.history["outer_loss"], run.setting("method"), run.to_xarray()""",
    "Python, h5py": """\
import h5py
with h5py.File("run.h5", locking=False) as file:
    count = file["records/history"][()]
    step, loss = (file["history"][name][:count] for name in ("step", "outer_loss"))
    status = file.attrs["status"].decode()
    step_size = file["config/method"].attrs["step_size"]""",
    "Python, xarray": """\
import h5py, xarray
with h5py.File("run.h5", locking=False) as file:
    count = int(file["records/history"][()])
history = xarray.open_dataset("run.h5", group="history", engine="h5netcdf")
loss = history["outer_loss"][:count]""",
    "MATLAB": """\
count = double(h5read('run.h5', '/records/history'));
loss = h5read('run.h5', '/history/outer_loss', 1, count);
status = h5readatt('run.h5', '/', 'status');""",
    "Julia": """\
using HDF5
h5open("run.h5") do file
    count = read(file["records/history"])
    loss = file["history/outer_loss"][1:count]
    status = read_attribute(file, "status")
end""",
}


def find(path: str) -> Part | None:
    """The part that describes a place in a file, as h5py names it, ``@`` before an attribute.

    Examples
    --------
    >>> find("records/history").dtype
    'int64'
    """
    return next((part for part in PARTS if part.matches(path)), None)


def markdown() -> str:
    """The whole description, as Markdown.

    Examples
    --------
    >>> markdown().splitlines()[0]
    'A run is one HDF5 file, of the format `hyperlearn-run`, schema 2.'
    """
    rows = [
        f"| `{part.path}` | {part.dtype} | {part.shape} | {part.meaning} |".replace("  ", " ")
        for part in PARTS
    ]
    certificate = ", ".join(f"`{f.name}`" for f in fields(Certificate))
    values = [f"| `{kind}` | {how} |" for kind, how in VALUES.items()]
    languages = {"Python": "python", "MATLAB": "matlab", "Julia": "julia"}
    code = [
        f"{name}:\n\n```{languages[name.partition(',')[0]]}\n{text}\n```"
        for name, text in READING.items()
    ]
    return "\n".join(
        [
            f"A run is one HDF5 file, of the format `{FORMAT}`, schema {SCHEMA}.",
            "",
            "| Place | Type | Shape | Meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Fields of a certificate: `step`, {certificate}.",
            "",
            f"Values, in {', '.join(f'`/{tree}`' for tree in TREES)}:",
            "",
            "| Attribute `kind` | Stored as |",
            "| --- | --- |",
            *values,
            "",
            "| Other attributes | Meaning |",
            "| --- | --- |",
            *(f"| `{name}` | {meaning} |" for name, meaning in VALUE_ATTRIBUTES.items()),
            "",
            *(f"{note}\n" for note in NOTES),
            *(f"{text}\n" for text in code),
        ]
    )
