"""The how-to is followed word by word: its files are written, its commands run."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from unembed.cli import main as cli
from unembed.config import shipped_configs

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF$", re.MULTILINE | re.DOTALL)
SMALLER = {"steps: 300": "steps: 12", "eval_every: 100": "eval_every: 6"}


def steps(page):
    """What a page asks the reader to do, in order: (file name, content) or ("", command)."""
    for block in FENCE.findall(page):
        if "pip install" in block:
            continue
        place = 0
        for found in FILE.finditer(block):
            yield from (("", line) for line in block[place : found.start()].splitlines() if line)
            yield found[1], found[2]
            place = found.end()
        yield from (("", line) for line in block[place:].splitlines() if line)


COMMAND = re.compile(r"^(?:#   )?unembed .*$|`(unembed [^`]+)`", re.MULTILINE)
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")), *shipped_configs().values()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_has_the_options_it_is_given(page):
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(cli.app).commands.items()
    }
    for found in COMMAND.finditer(page.read_text(encoding="utf-8")):
        words = found[0].strip("`").removeprefix("#   ").split("#")[0].split()
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        if len(words) > 1 and not words[1].startswith("-"):
            assert given - {"--help"} <= known[words[1]], found[0]


LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
ROOT = DOCS.parent
LINKING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "src" / "unembed" / "pretrained" / "minilm" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub makes of the page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_the_pages_of_results_and_layout_stay_short():
    """One screen a claim, and the layout on two screens; the log keeps what is longer."""
    for name, most in (("results.md", 220), ("architecture.md", 120)):
        assert len((DOCS / name).read_text("utf-8").splitlines()) <= most, name


@pytest.fixture
def follow(tmp_path, monkeypatch, capsys):
    """Take a step in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def take(name, text):
        if name:
            Path(name).write_text(text, encoding="utf-8")
            return ""
        program, *arguments = shlex.split(text)
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            assert program == "unembed", f"no such command here: {text}"
            monkeypatch.setattr("sys.argv", [program, *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code in (0, None), f"{text}\n{capsys.readouterr().err}"
        return capsys.readouterr().out

    return take


@pytest.mark.slow
def test_your_own_encoder_can_be_followed(follow):
    page = (DOCS / "your-own-encoder.md").read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in page
        page = page.replace(large, small)
    said = {text: follow(name, text) for name, text in steps(page)}
    commands = [text.split()[1] for text in said if text.startswith("unembed")]
    assert sorted(set(commands)) == sorted(
        "preflight prepare inspect train export invert evaluate".split()
    )
    told = {text.split()[1]: out for text, out in said.items() if text.startswith("unembed")}
    assert "failed" not in told["preflight"]
    inspected = " ".join(told["inspect"].split())
    assert re.search(r"en \d+ \(passages, by the column 'lang' of raw\)", inspected)
    assert "step 12" in told["train"]
    assert len(told["invert"].splitlines()) == 2, "one text for each vector of the file"
    assert "vector only" in told["evaluate"] and "nearest" in told["evaluate"]
    assert Path("pairs.png").read_bytes().startswith(b"\x89PNG")
    assert (Path("my-inverter") / "model.safetensors").is_file()
