"""The Chinese words beside the English ones: none is missing, none is left over, and both say the same numbers and names.
The Chinese README is held to the English one too, so that a change of one is noticed in the other.

English needs no file in ``locales``: the front end shows the words of a node's schema, and of a setting or command, if the user's
locale has no entry. Words in ``locales`` are also compiled as messages, in which some characters are syntax; a schema's are not.
"""

import ast
import calendar
import json
import re
from collections import Counter

import pytest

from .conftest import REPO
from .support import front_end
from .support.comfy_runtime import declared_nodes

LOCALES, PAGES = REPO / "locales", REPO / "web" / "docs"
FILES = ("main", "nodeDefs", "settings", "commands")
KEPT = {"VAE", "Latent"}
"""Names that Chinese users write as they are."""
ORDINARY = {"on", "image"}
"""Options that English tooltips use as ordinary words."""
CHINESE = re.compile("[一-鿿]")
SYNTAX = re.compile(r"[{}@|]")
"""What the front end does not show as it is in a word of a locale: a place for a value, a link, a plural."""
NAMES_AND_NUMBERS = re.compile(r"[\w./%:+-]*[\d_/%][\w./%:+-]*", re.ASCII)
CODE, BOLD = re.compile(r"`[^`]+`"), re.compile(r"\*\*([^*]+)\*\*")
BLOCK, COMMENT = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL), re.compile(r"[ ]+# .*")
PLACE = re.compile(r"{\w+}")
"""Where the page puts a value into a text."""
LINK, NUMBER = re.compile(r"\]\(([^)]+)\)"), re.compile(r"\d+(?:\.\d+)*")
MONTH = re.compile(rf"\b({'|'.join(calendar.month_name[1:])})(?= \d{{4}})")


def of_locale(name: str) -> dict[str, str]:
    """The words of a Chinese file, by path: ``{"XDiTBackend.inputs.plan.name": "并行方案"}``."""
    path = LOCALES / "zh" / f"{name}.json"
    return dict(words(json.loads(path.read_text("utf-8")))) if path.exists() else {}


def words(tree: dict | str, at: str = ""):
    if isinstance(tree, str):
        yield at, tree
    else:
        for key, value in tree.items():
            yield from words(value, f"{at}.{key}" if at else key)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> dict[str, dict]:
    declared = declared_nodes(tmp_path_factory.mktemp("runtime"))["nodes"]
    return {name: info for name, info in declared.items() if name.startswith("XDiT")}


def inputs_of(info: dict) -> dict[str, dict]:
    """The options of each input."""
    groups = (info["input"].get(group) or {} for group in ("required", "optional"))
    return {name: spec[1] if len(spec) > 1 else {} for group in groups for name, spec in group.items()}


@pytest.fixture(scope="module")
def english(nodes) -> dict[str, str]:
    """The words of the nodes that the front end looks up, by path. It looks up no option of a widget."""
    found = {}
    for node, info in nodes.items():
        found |= {f"{node}.display_name": info["display_name"], f"{node}.description": info["description"]}
        for name, options in inputs_of(info).items():
            found[f"{node}.inputs.{name}.name"] = options.get("display_name", name)
            if options.get("tooltip"):
                found[f"{node}.inputs.{name}.tooltip"] = options["tooltip"]
        for index, (kind, name) in enumerate(zip(info["output"], info["output_name"])):
            if name != kind:  # the front end has words of its own for types
                found[f"{node}.outputs.{index}.name"] = name
        for index, tooltip in enumerate(info.get("output_tooltips") or []):
            if tooltip:
                found[f"{node}.outputs.{index}.tooltip"] = tooltip
    return found


def facts(text: str) -> set[str]:
    """What a translation must not change: code, numbers, and names with a digit, underscore or slash."""
    prose = CODE.sub(" ", text)
    return {*CODE.findall(text), *(found.strip(".:,-") for found in NAMES_AND_NUMBERS.findall(prose))}


def compare(translated: set[str] | Counter, expected: set[str] | Counter, what: str) -> None:
    assert not expected - translated, f"{what} lacks {sorted(expected - translated)}"
    assert not translated - expected, f"{what} has {sorted(translated - expected)}, which nothing uses"


def test_every_word_of_a_node_is_there_in_chinese_and_no_other(english):
    compare(set(of_locale("nodeDefs")), set(english), "locales/zh/nodeDefs.json")


def test_a_word_of_a_node_says_the_same_in_both_languages(english, nodes):
    chinese, same = of_locale("nodeDefs"), {}
    for path, text in english.items():
        if path.endswith(".name"):
            continue
        assert facts(chinese[path]) == facts(text), path
        if ".inputs." in path:
            node, _, name, _ = path.split(".")
            options = {str(option) for option in inputs_of(nodes[node])[name].get("options") or []}
            for option in options - ORDINARY:
                named = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.ASCII)
                assert bool(named.search(text)) == bool(named.search(chinese[path])), f"{path}: {option}"
        assert same.setdefault(text, chinese[path]) == chinese[path], f"{path}: the same English words are translated otherwise"


def test_words_are_chinese_and_shown_as_they_are():
    for name in FILES:
        for key, text in of_locale(name).items():
            assert CHINESE.search(text) or text in KEPT, f"{name}, {key} is not Chinese: {text}"
            assert not SYNTAX.search(text), f"{name}, {key}: the front end does not show {SYNTAX.findall(text)}"


def test_comfyui_reads_every_file_of_locales():
    files = {path.relative_to(LOCALES).as_posix() for path in LOCALES.rglob("*") if path.is_file()}
    assert files <= {f"zh/{name}.json" for name in FILES}


def test_every_help_page_has_a_chinese_page_that_says_the_same(nodes):
    chinese, pages = of_locale("nodeDefs"), {path.parent.name for path in PAGES.glob("*/zh.md")}
    compare(pages, set(nodes), "web/docs/*/zh.md")
    for node, info in nodes.items():
        page, translated = ((PAGES / name).read_text("utf-8") for name in (f"{node}.md", f"{node}/zh.md"))
        assert page.splitlines()[0] == f"# {info['display_name']}"
        assert translated.splitlines()[0] == f"# {chinese[f'{node}.display_name']}"
        labels = {options.get("display_name", name): name for name, options in inputs_of(info).items()}
        names = {*labels, *labels.values()}
        compare(facts(translated) - names, facts(page) - names, f"web/docs/{node}/zh.md")
        assert translated.count("\n- ") == page.count("\n- "), f"{node}: one of the pages has more points"
        shown = "、".join(BOLD.findall(translated))
        for label in labels.keys() & set(", ".join(BOLD.findall(page)).split(", ")):
            assert chinese[f"{node}.inputs.{labels[label]}.name"] in shown, f"web/docs/{node}/zh.md does not explain {label}"


def test_every_setting_and_command_is_there_in_chinese_and_no_other():
    sources = [path.read_text("utf-8") for path in (REPO / "web").rglob("*.js")]
    settings = {f"{name}.{word}" for source in sources for name, own in front_end.settings(source).items() for word in own}
    commands = {f"{name}.label" for source in sources for name in front_end.commands(source)}
    compare(set(of_locale("settings")), settings, "locales/zh/settings.json")
    compare(set(of_locale("commands")), commands, "locales/zh/commands.json")


def test_every_word_of_the_page_is_there_in_chinese_and_says_the_same():
    chinese = front_end.table((REPO / "web" / "js" / "words.js").read_text("utf-8"), "CHINESE")
    said = set.union(*(front_end.said(path.read_text("utf-8")) for path in (REPO / "web").rglob("*.js")))
    compare(set(chinese), said | said_by_the_server(), "web/js/words.js")
    for english, text in chinese.items():
        assert CHINESE.search(text), f"web/js/words.js is not Chinese: {text}"
        assert sorted(PLACE.findall(text)) == sorted(PLACE.findall(english)), f"web/js/words.js: {english}"


def said_by_the_server() -> set[str]:
    """What the page translates of the server's answers: names of states, and what free, stop and restart did."""
    (states,) = re.findall(r"`state` \(([^)]+)\)", (REPO / "docs" / "routes.md").read_text("utf-8"))
    actions = [
        node
        for node in ast.parse((REPO / "nodes" / "comfy" / "state.py").read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in ("free", "stop", "restart")
    ]
    assert len(actions) == 3
    done = {node.value.value for action in actions for node in ast.walk(action) if isinstance(node, ast.Return)}
    return {name.strip("`") for name in states.split(", ")} | done


def test_settings_and_commands_are_found_in_javascript():
    source = """
    const tab = { id: "Pack.panel", title: "{ not a command", render: (box) => { box.id = "x"; } };
    // { id: "Pack.Old", defaultValue: 1 }
    app.registerExtension({
      settings: [
        { id: "Pack.Idle.Minutes", name: "Idle", type: "number", tooltip: `for ${minutes}`, defaultValue: 30,
          onChange: (value) => { send({ value }); } },
        { id: 'Pack.Start', name: "Start", type: "combo", options: [{ text: "at.once", value: 1 }, { text: "later", value: 2 }],
          defaultValue: 1 },
      ],
      commands: [{ id: "Pack.Stop", label: "Stop", function: async () => { await stop(); } }, { id: "Pack.Logs", function() {} }],
    });
    """
    assert front_end.settings(source) == {
        "Pack_Idle_Minutes": {"name", "tooltip"},
        "Pack_Start": {"name", "options.at_once", "options.later"},
    }
    assert front_end.commands(source) == {"Pack_Stop", "Pack_Logs"}
    with pytest.raises(ValueError):
        front_end.settings("app.registerExtension({ settings: [{ id: PREFIX + 'Idle', defaultValue: 1 }] });")


def readmes() -> tuple[str, str]:
    """The English and the Chinese README. Both have months as numbers: ``11 2026`` and ``2026 年 11 月``."""
    english, chinese = ((REPO / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    return MONTH.sub(lambda found: str(list(calendar.month_name).index(found[1])), english), chinese


def commands(text: str) -> list[str]:
    """The lines of a README's code blocks, without comments."""
    return [COMMENT.sub("", line) for block in BLOCK.findall(text) for line in block.splitlines()]


def parts(text: str) -> list[str]:
    """A README's headings, table rows, pictures and list items, each with the text and the comments of code blocks after it."""
    prose = BLOCK.sub(lambda block: " ".join(COMMENT.findall(block[0])), text)
    return re.split(r"\n(?=#+ |\||!|- )", prose)


def kept(part: str) -> Counter:
    """What a translation keeps of a part, and how often: the sign that starts it, cells of a table row, inline code, numbers."""
    sign = re.match(r"#+ |\||!|- ", part)
    words = LINK.sub("]", part)
    cells = part.splitlines()[0].count("|") if part.startswith("|") else 0
    return Counter([sign[0], *"|" * cells, *CODE.findall(words), *NUMBER.findall(CODE.sub(" ", words))])


def test_the_readmes_have_the_same_commands():
    english, chinese = map(commands, readmes())
    assert any(line.startswith("git clone ") for line in english)
    assert chinese == english


def test_the_readmes_have_the_same_headings_tables_lists_code_and_numbers():
    english, chinese = map(parts, readmes())
    for ours, theirs in zip(english, chinese):
        compare(kept(theirs), kept(ours), f"the Chinese of {ours.splitlines()[0]!r}, {theirs.splitlines()[0]!r},")
    assert len(chinese) == len(english), "one of the READMEs has more at its end"


def test_the_readmes_link_to_the_same_pages_and_these_exist():
    english, chinese = (Counter(LINK.findall(text)) for text in readmes())
    help_pages = {f"web/docs/{page.parent.name}/zh.md" for page in PAGES.glob("*/zh.md")}
    assert english - chinese == Counter({"README.zh-CN.md": 1})
    assert chinese - english == Counter({"README.md": 1, **dict.fromkeys(help_pages, 1)})
    files = {target.partition("#")[0] for target in english | chinese if "://" not in target}
    assert not {name for name in files if not (REPO / name).is_file()}


def test_the_chinese_readme_names_each_node_as_its_help_page_does():
    english, chinese = readmes()
    for page in PAGES.glob("*/zh.md"):
        node = page.parent.name
        name, translated = (path.read_text("utf-8").splitlines()[0].removeprefix("# ") for path in (PAGES / f"{node}.md", page))
        assert f"\n| {name} | " in english
        assert f"\n| [{translated}](web/docs/{node}/zh.md) | " in chinese


def test_the_chinese_readme_has_the_way_for_china_before_the_download():
    _, chinese = readmes()
    assert chinese.index("在中国大陆") < chinese.index("parallel_backend download")
    assert "--source modelscope" in chinese and "HF_ENDPOINT=" in chinese
