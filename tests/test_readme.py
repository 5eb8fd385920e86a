"""README and docs say what is so: their Python is run, their commands exist."""

import dataclasses
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]

COMMENT = re.compile(r"<!-- (command|not run): (.+) -->")
FENCE = re.compile(r"( *)(```+|~~~+)(.*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: First word after the opening fence.
        line: Number of the block's first line of content in the page, from 1.
        lines: Content, without the indentation of the fence.
        mark: `("command", name)` or `("not run", reason)` where a comment of
            that form stands on the line before the fence, else `(None, None)`.
    """

    language: str
    line: int
    lines: list
    mark: tuple


def fenced_blocks(text):
    """Returns the fenced blocks of a Markdown text, in order."""
    blocks, opening, mark = [], None, (None, None)
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.fullmatch(line)
        if opening is None and fence:
            indent, opening, language = fence.groups()
            language = language.strip().split(" ")[0]
            blocks.append(Block(language, number + 1, [], mark))
        elif opening is None:
            comment = COMMENT.fullmatch(line.strip())
            mark = comment.groups() if comment else (None, None)
        elif line.strip() == opening:
            opening, mark = None, (None, None)
        else:
            blocks[-1].lines.append(line.removeprefix(indent))
    return blocks


def python_blocks(page):
    """Returns the Python blocks of a page: those to run, and the others."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    blocks = [b for b in fenced_blocks(text) if b.language in ("python", "py")]
    skipped = [block for block in blocks if block.mark[0] == "not run"]
    return [block for block in blocks if block not in skipped], skipped


def as_script(blocks):
    """Joins blocks into one script, each line at its number in the page.

    So a traceback names the line of the page.
    """
    lines = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.lines
    return "\n".join(lines) + "\n"


def failing_block(blocks, script, stderr):
    """Returns where the page failed, from the traceback of its script."""
    place = rf'File "{re.escape(str(script))}", line (\d+)'
    lines = [int(line) for line in re.findall(place, stderr)] or [0]
    before = [block for block in blocks if block.line <= lines[-1]]
    return (before or blocks)[-1].line, lines[-1]


# They begin as a user does, with a new interpreter, and one makes a strategy.
ALONE = [README, ROOT / "docs" / "distributed.md"]
RUN = [page for page in PAGES if page == README or any(python_blocks(page))]

# Runs scripts one after the other, each in its folder, with names of its own,
# and prints a line of JSON for each, with the traceback if there is one.
ONE_BY_ONE = """if True:
    import contextlib, json, os, runpy, sys, traceback
    for script in sys.argv[1:]:
        os.chdir(os.path.dirname(script))
        error = ""
        with contextlib.redirect_stdout(sys.stderr):
            try:
                runpy.run_path(script, run_name="__main__")
            except BaseException:
                error = traceback.format_exc()
        print(json.dumps({"script": script, "error": error}), flush=True)
"""


@pytest.fixture(scope="module")
def errors_of(run_python, tmp_path_factory):
    """Returns a function from page to its script and the script's traceback.

    Most pages are run in one process, at the first call: importing TensorFlow
    takes longer than their few lines.
    """
    folder = tmp_path_factory.mktemp("pages")
    scripts, errors = {}, {}
    for number, page in enumerate(RUN):
        scripts[page] = folder / str(number) / page.with_suffix(".py").name
        scripts[page].parent.mkdir()
        text = as_script(python_blocks(page)[0])
        scripts[page].write_text(text, encoding="utf-8")

    def run(pages):
        names = [str(scripts[page]) for page in pages]
        process = run_python("-c", ONE_BY_ONE, *names, cwd=folder, timeout=400)
        lines = map(json.loads, process.stdout.splitlines())
        found = {one["script"]: one["error"] for one in lines}
        for page, name in zip(pages, names):
            error = found.get(name, "Its interpreter ended.")
            if process.returncode != 0:
                error = error or f"The exit code is {process.returncode}."
            errors[page] = error and f"{process.stderr}\n{error}"

    def error_of(page):
        if page not in errors:
            together = [one for one in RUN if one not in ALONE]
            run([page] if page in ALONE else together)
        return scripts[page], errors[page]

    return error_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_blocks_run(page, errors_of, capsys):
    blocks, skipped = python_blocks(page)
    name = page.relative_to(ROOT).as_posix()
    assert blocks or page != README, f"{name} shows no Python that is run."

    script, error = errors_of(page)

    block, line = failing_block(blocks, script, error)
    assert not error, (
        f"{name}: the Python block that starts at line {block} failed at line "
        f"{line}.\nMend the block or the code; a block that cannot run takes "
        "`<!-- not run: reason -->` on the line before it.\n\n"
        f"{error}"
    )
    with capsys.disabled():
        print(f"\n{name}: {len(blocks)} Python blocks run", end="")
        for block in skipped:
            print(f"\n  line {block.line} not run: {block.mark[1]}", end="")


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_readme_has_the_command_that_ci_runs(command):
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    marked = [b for b in fenced_blocks(text) if b.mark == ("command", command)]
    assert [block.language for block in marked] == ["bash"], (
        f"README.md needs one line `<!-- command: {command} -->` with a "
        "```bash fence on the next line: .ci/run executes what stands there."
    )


def test_blocks_are_found_with_their_lines_and_marks():
    page = "\n".join(
        [
            "<!-- not run: needs two machines -->",
            "```python",
            "first",
            "```",
            "<!-- command: lost, the fence is not on the next line -->",
            "",
            "  ```bash",
            "  second",
            "    third",
            "  ```",
        ]
    )
    assert fenced_blocks(page) == [
        Block("python", 3, ["first"], ("not run", "needs two machines")),
        Block("bash", 8, ["second", "  third"], (None, None)),
    ]
    assert as_script(fenced_blocks(page)).splitlines()[7] == "second"


def test_reference_lists_the_public_names():
    # The README's reference names everything that `import keras_batchsize`
    # offers, and nothing that it does not.
    import keras_batchsize

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    reference = text.split("## Reference", 1)[1].split("everything public")[0]
    listed = set(re.findall(r"`(\w+)`", reference))
    assert listed == set(keras_batchsize.__all__) - {"__version__"}
