"""A flow as a picture."""

import html.parser
import itertools
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventor import Counts, DefinitionError, DrawError, Graph, TaskCounts, UsageError, or_
from eventor.look import picture
from eventor.words import clean, shorten

# What stands in SVG and in other notations; the command draws a flow on every Python.
pytestmark = [pytest.mark.once, pytest.mark.stores("sqlite")]

HOSTILE = [
    '"',
    "\\",
    'a\\"; evil [label="x',
    r"\N \n \l \E",
    "</title></style></svg><script>alert(1)</script>",
    "<b>&lt;&amp;&#60;",
    "]]>",
    "end",
    "graph",
    "`**md**`",
    '#quot;"]:::success',
    "%%{init: {}}%%",
    "{0} {title} %s",
    "übergroß 漢字 עברית 🙂 é",
    "x" * 500,
    "http://example.org/?a=1&b=2",
    "a -->|b| c; click e0 call alert()",
]


def flow(names):
    """Return the definition of a flow in which each name is that of an event and of a step."""
    return {
        "events": [{"name": name, "expr": None} for name in names],
        "steps": [
            {"name": name, "func": name, "triggers": {}, "recovery": {}, "config": {name: name}}
            for name in names
        ],
        "assocs": [{"event": name, "events": [], "steps": [name]} for name in names],
    }


def expressed(expr):
    """Return the definition of a flow in which event `all` has an expression."""
    names = sorted({token for token in expr if isinstance(token, str)})
    events = [*({"name": name, "expr": None} for name in names), {"name": "all", "expr": expr}]
    return {"events": events, "steps": [], "assocs": []}


def shape(definition, **options):
    """Return what is drawn, with the names in place of the keys."""
    graph = Graph(definition, **options)
    names = {key: node.name for key, node in graph._diagram.nodes.items()}
    edges = [(names[e.tail], names[e.head], e.kind, e.label) for e in graph._diagram.edges]
    return sorted(names.values()), edges


def elements(svg, kind):
    """Return the groups of a class in an SVG."""
    groups = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    return [group for group in groups if kind in group.get("class").split()]


def texts(svg):
    return [text.text for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def orders(make):
    """Define a flow with all that can be drawn."""
    ev = make(name="orders")
    begin, review = ev.add_event("order came in"), ev.add_event("review")

    @ev.step(after=begin)
    def fetch():
        return 1

    @ev.step(after=fetch.success, args=(fetch.result,), config={"max_attempts": 2})
    def price(_fetched):
        raise ValueError("no price")

    @ev.step(after=price.failure)
    def apologize():
        return 2

    @ev.step(after=or_((price.success, fetch.complete), apologize.active))
    def ship():
        return 3

    ev.add_assoc(ship.success, review, delay=0.01)
    ev.add_assoc(review, ev.add_step("ask", int))
    ev.begin = begin
    return ev


def test_events_and_steps_are_told_apart_by_shape(orders):
    svg = orders.graph().svg
    assert len(elements(svg, "event")) == 9
    assert len(elements(svg, "step")) == 5
    assert {"order came in", "fetch.success", "fetch", "ask"} <= set(texts(svg))


def test_an_arrow_tells_what_it_means(orders):
    _, edges = shape(orders._flow.definition())
    assert ("price", "price.failure", "failure", "failure") in edges
    assert ("apologize", "apologize.active", "active", "active") in edges
    assert ("fetch", "fetch.complete", "complete", "complete") in edges
    assert ("order came in", "fetch", "leads", "") in edges
    assert ("ship.success", "review", "leads", "+0.01 s") in edges
    assert ("fetch", "price", "needs", "result") in edges
    svg = orders.graph().svg
    assert {"failure", "success", "complete", "active", "+0.01 s", "result"} <= set(texts(svg))
    assert len(elements(svg, "edge")) == len(edges)


def test_expressions_are_junctions(orders):
    _, edges = shape(orders._flow.definition())
    operands = [edge[:2] for edge in edges if edge[2] == "operand"]
    assert operands == [
        ("price.success", "and"),
        ("fetch.complete", "and"),
        ("and", "or"),
        ("apologize.active", "or"),
    ]
    assert ("or", "ship.after", "holds", "") in edges


def test_an_expression_that_says_one_thing_is_an_arrow():
    expected = ["a", "all"], [("a", "all", "operand", "")]
    assert shape(expressed(["a"])) == expected
    assert shape(expressed(["a", {"and": 1}, {"or": 1}])) == expected
    assert shape(expressed(["a", "a", {"or": 2}])) == expected


def test_an_operator_within_its_like_is_one_junction():
    names, edges = shape(expressed(["a", "b", "c", {"and": 2}, "d", {"and": 1}, {"and": 3}]))
    assert names.count("and") == 1
    assert sorted(tail for tail, head, *_ in edges if head == "and") == ["a", "b", "c", "d"]


def test_a_long_expression_is_read_in_one_go():
    chain = ["e0", *itertools.chain.from_iterable((f"e{n}", {"or": 2}) for n in range(1, 20_000))]
    names, edges = shape(expressed(chain))
    assert names.count("or") == 1
    assert len(edges) == 20_001
    deep = ["e0"]
    for number in range(1, 5_000):
        deep += [f"e{number}", {"or" if number % 2 else "and": 2}]
    assert len(shape(expressed(deep))[0]) == 5_000 + 4_999 + 1


def test_few_events_leave_out_those_that_only_link(orders):
    names, edges = shape(orders._flow.definition(), events="few")
    assert [name for name in names if name not in ("and", "or")] == [
        *("apologize", "ask", "fetch", "order came in", "price", "review", "ship")
    ]
    assert ("fetch", "price", "success", "success") in edges
    assert ("price", "apologize", "failure", "failure") in edges
    assert ("price", "and", "success", "success") in edges
    assert ("or", "ship", "holds", "") in edges
    assert ("ship", "review", "success", "success +0.01 s") in edges


def test_few_events_keep_what_has_several_causes_or_leads_nowhere():
    step = {"func": "f", "recovery": {}, "config": {}}
    definition = {
        "events": [{"name": name, "expr": None} for name in ("begin", "done", "end")],
        "steps": [
            {"name": "one", "triggers": {"at_success": ["done"]}, **step},
            {"name": "two", "triggers": {"at_success": ["done", "end"]}, **step},
            {"name": "three", "triggers": {}, **step},
        ],
        "assocs": [
            {"event": "begin", "events": [], "steps": ["one", "two"]},
            {"event": "done", "events": [], "steps": ["three"]},
        ],
    }
    assert shape(definition, events="few") == shape(definition)
    with pytest.raises(DrawError, match="events is 'some'; expected 'all' or 'few'"):
        Graph(definition, events="some")


def test_what_is_defined_meanwhile_is_drawn_all_the_same():
    definition = {
        "events": [],
        "steps": [],
        "assocs": [{"event": "new", "events": ["next"], "steps": ["late"]}],
    }
    assert shape(definition)[0] == ["late", "new", "next"]


def test_how_things_stand_is_told_by_signs_and_numbers(orders):
    graph = orders.graph()
    assert elements(graph.svg, "sign") == []
    orders.trigger_events(orders.begin, [1, 2])
    orders.run(max_loops=1)
    told = texts(orders.graph().svg)
    assert f"order came in {picture.TIMES}2" in told
    orders()
    graph = orders.graph()
    assert repr(graph) == (
        "<Graph of 'orders, run 1.0': 5 steps, 9 events; tasks: 2 failure, 8 success>"
    )
    assert "2 ✗" in graph.mermaid
    assert "2 ✗" in graph.dot
    (price,) = (group for group in elements(graph.svg, "step") if "failure" in group.get("class"))
    signs = [part.get("class") for part in price if "sign" in part.get("class", "")]
    assert signs == ["sign failure"]
    assert [part.text for part in price if part.tag.endswith("text")] == ["price", "2"]


def test_one_task_is_told_in_words():
    graph = Graph(
        flow(["a"]), Counts({"a": TaskCounts(skipped=1), "gone": TaskCounts(failure=3)}, {"a": 1})
    )
    assert "skipped" in texts(graph.svg)
    assert "● a" in graph.mermaid
    assert "↷ skipped" in graph.mermaid
    assert repr(graph) == "<Graph of 'flow': 1 step, 1 event; tasks: 1 skipped>"


def luminance(colour):
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [picture.LIGHT, picture.DARK], ids=["light", "dark"])
def test_colours_have_contrast(colours):
    assert set(colours) == set(picture.LIGHT)
    page = colours["page"].ground
    for of in colours.values():
        assert contrast(of.ink, of.ground) >= 4.5
        assert contrast(of.ink, page) >= 4.5
    for word in ("success", "failure", "active", "ready", "skipped", "raised", "complete"):
        assert contrast(colours[word].border, page) >= 3


def rendered(source):
    """Return the first line of each node as Graphviz itself draws a graph."""
    code = picture._LAYOUT.replace("json0", "svg")
    ran = subprocess.run(
        [sys.executable, "-c", code], input=source, capture_output=True, check=True, encoding="utf8"
    )
    return [node.findtext("{*}text") for node in elements(ran.stdout, "node")]


def decoded(text):
    return re.sub(r"#(\d+);", lambda found: chr(int(found[1])), text)


def check_names(names):
    graph = Graph(flow(names), title=" ".join(names))
    svg = graph.svg
    events = [group.findtext("{*}text") for group in elements(svg, "event")]
    steps = [group.findtext("{*}text") for group in elements(svg, "step")]
    assert events == steps == [shorten(name, picture._SHOWN) for name in names]
    assert {part.tag.rpartition("}")[2] for part in ET.fromstring(svg).iter()} <= {
        *("svg", "title", "style", "rect", "g", "path", "polygon", "text")
    }
    tooltips = [title.text for group in elements(svg, "event") for title in group[:1]]
    assert tooltips == [f"event {name}" for name in names]
    spaced = sorted(name.replace("\xa0", " ") for name in (*names, *names))
    assert sorted(name.replace("\xa0", " ") for name in rendered(graph.dot)) == spaced
    lines = graph.mermaid.splitlines()[1 : len(names) + 1]
    quoted = [re.fullmatch(r'    e\d+\(\["([^"<>`&]*)"\]\):::event', line) for line in lines]
    assert [decoded(found[1]) for found in quoted] == names
    page = Page()
    page.feed(graph.html)
    assert page.data[0] == " ".join(names)
    assert "script" not in page.tags


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.data, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.data += [data] if self.tags and self.tags[-1] == "title" else []


def test_a_hostile_name_is_a_name_in_every_notation():
    check_names(HOSTILE)


NAMES = st.text(min_size=1, max_size=60).map(clean).filter(lambda name: name.strip())


@settings(max_examples=3)
@given(st.lists(NAMES, min_size=20, max_size=40, unique=True))
def test_any_names_are_names_in_every_notation(names):
    check_names(names)


def test_a_picture_is_for_light_and_dark_pages_and_loads_nothing():
    graph = Graph(flow(["a"]), title="a <flow>")
    assert "@media screen and (prefers-color-scheme: dark)" in graph.svg
    page = Page()
    page.feed(graph.html)
    assert page.links == []
    assert "url(" not in graph.html
    assert "<h1>a &lt;flow&gt;</h1>" in graph.html
    assert graph.html.count("@media screen and (prefers-color-scheme: dark)") == 2


@pytest.mark.parametrize("ending", ["svg", "png", "html", "mmd", "dot", "SVG"])
def test_the_ending_of_a_file_tells_its_format(ending, tmp_path):
    graph = Graph(flow(["a"]))
    path = tmp_path / f"flow.{ending}"
    path.write_text("what was there before")
    graph.save(str(path))
    expected = {
        "svg": graph.svg.encode(),
        "png": graph.png(),
        "html": graph.html.encode(),
        "mmd": graph.mermaid.encode(),
        "dot": graph.dot.encode(),
    }
    assert path.read_bytes() == expected[ending.lower()]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["flow", "flow.pdf", ".svg"])
def test_another_ending_is_an_error_that_lists_them(name, tmp_path):
    with pytest.raises(DrawError, match=r"ends in \.svg, \.png, \.html, \.mmd, \.dot"):
        Graph(flow(["a"])).save(tmp_path / name)


def test_a_file_that_cannot_be_written_is_an_error_and_left_alone(tmp_path):
    graph = Graph(flow(["a"]))
    with pytest.raises(DrawError, match=r"missing/flow\.dot'.*No such file"):
        graph.save(tmp_path / "missing/flow.dot")
    (tmp_path / "flow.dot").mkdir()
    with pytest.raises(DrawError, match=r"flow\.dot'.*directory"):
        graph.save(tmp_path / "flow.dot")
    assert [path.name for path in tmp_path.iterdir()] == ["flow.dot"]


def test_a_png_has_the_size_of_its_scale(monkeypatch):
    graph = Graph(flow(["a"]))

    def size(png):
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])

    (width, height), double = size(graph.png(1)), size(graph.png())
    assert double == pytest.approx((2 * width, 2 * height), abs=2)
    monkeypatch.setattr("eventor.look.draw._MOST_PIXELS", width * height)
    with pytest.warns(UserWarning, match="too large: it is drawn with scale=1"):
        assert size(graph.png(3)) == pytest.approx((width, height), abs=2)


@pytest.mark.parametrize("scale", [0, -1, 101, float("nan"), float("inf"), True, "2", None])
def test_a_scale_that_is_no_number_above_0_is_an_error(scale):
    with pytest.raises(DrawError, match="expected a number above 0"):
        Graph(flow(["a"])).png(scale)


def test_a_png_without_fonts_is_an_error_that_says_what_to_install(monkeypatch):
    import resvg_py

    draw = resvg_py.svg_to_bytes
    monkeypatch.setattr(
        resvg_py, "svg_to_bytes", lambda **given: draw(**given, skip_system_fonts=True)
    )
    with pytest.raises(DrawError, match=r"no fonts.*fonts-dejavu-core"):
        Graph(flow(["a"])).png()


@pytest.mark.parametrize("there", ["Arial", "DejaVu Sans", "Verdana"])
def test_a_png_is_drawn_with_whatever_common_font_there_is(monkeypatch, there):
    import resvg_py

    drawn = []

    def with_one_font(svg_string, sans_serif_family="Arial", zoom=1.0):
        drawn.append(sans_serif_family)
        has_text = ">A<" in svg_string or len(svg_string) > 1_000
        return svg_string.encode() if has_text and sans_serif_family == there else b"blank"

    monkeypatch.setattr(resvg_py, "svg_to_bytes", with_one_font)
    assert Graph(flow(["a"])).png() != b"blank"
    assert drawn[-2:] == [there, there]


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)


@pytest.mark.usefixtures("without_extra")
def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    graph = Graph(flow(["a"]))
    for attempt in (lambda: graph.svg, lambda: graph.html, graph.png):
        with pytest.raises(DrawError, match=r"pip install 'eventor\[draw\]'"):
            attempt()
    graph.save(tmp_path / "flow.mmd")
    graph.save(tmp_path / "flow.dot")
    shown = graph._repr_mimebundle_()
    assert list(shown) == ["text/plain"]
    assert "eventor[draw]" in shown["text/plain"]


def test_png_alone_may_lack_its_library(monkeypatch):
    graph = Graph(flow(["a"]))
    assert graph.svg
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DrawError, match="resvg_py, which is not installed"):
        graph.png()


def test_a_layout_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(picture, "_LAYOUT", "import time; time.sleep(3600)")
    monkeypatch.setattr(picture, "_LAYOUT_SECONDS", 0.01)
    with pytest.raises(DrawError, match=r"took longer than 0\.01 s.*\.mermaid need no layout"):
        Graph(flow(["a"])).svg  # noqa: B018


def test_a_layout_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(picture, "_LAYOUT", "raise ValueError('out of memory')")
    with pytest.raises(DrawError, match="has failed: ValueError: out of memory"):
        Graph(flow(["a"])).svg  # noqa: B018
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(DrawError, match="cannot be started"):
        Graph(flow(["a"])).svg  # noqa: B018


@pytest.mark.parametrize(
    "definition",
    [
        None,
        {},
        {"events": [], "steps": []},
        {"events": [{"name": "a"}], "steps": [], "assocs": []},
        {"events": [{"name": 1, "expr": None}], "steps": [], "assocs": []},
        expressed([{"and": 2}]),
        expressed(["a", {"xor": 1}]),
        expressed(["a", "b"]),
        expressed(["a", {"and": 0}]),
        {**flow(["a"]), "assocs": [{"event": "a", "events": [], "steps": ["a"], "delay": "x"}]},
    ],
)
def test_what_is_no_definition_is_an_error(definition):
    with pytest.raises(DefinitionError, match="the definition of the flow cannot be drawn"):
        Graph(definition)


def test_a_flow_of_nothing_is_drawn():
    graph = Graph(flow([]))
    assert ET.fromstring(graph.svg).get("width") == "32"
    assert repr(graph) == "<Graph of 'flow': 0 steps, 0 events>"


def test_a_thousand_steps_are_drawn(make):
    ev = make()
    after = ev.add_event("begin")
    for number in range(1_000):
        step = ev.add_step(f"step {number}", int)
        ev.add_assoc(after, step)
        after = step.success
    assert len(elements(ev.graph(events="few").svg, "step")) == 1_000


def test_the_definition_in_the_store_gives_the_same_graph(orders):
    orders.trigger_event(orders.begin, 1)
    orders()
    stored = orders._store.definition(orders.run_id)
    counts = orders._store.count(orders.run_id, orders.recovery)
    assert Graph(stored, counts).mermaid == orders.graph().mermaid


def test_a_notebook_shows_the_graph_of_an_eventor(orders):
    shown = orders._repr_mimebundle_()
    assert shown["text/plain"] == repr(orders)
    assert "order came in" in texts(shown["image/svg+xml"])
    shown = orders.graph()._repr_mimebundle_(include=None, exclude=None)
    assert set(shown) == {"image/svg+xml", "text/plain"}
    orders.close()
    assert orders._repr_mimebundle_() == {"text/plain": repr(orders)}
    with pytest.raises(UsageError, match="closed"):
        orders.graph()


@pytest.mark.usefixtures("without_extra")
def test_a_notebook_shows_text_where_nothing_can_draw(orders):
    assert orders._repr_mimebundle_() == {"text/plain": repr(orders)}


def test_the_import_of_eventor_does_not_load_what_draws(script):
    ran = script("""
        import sys, eventor
        assert not {"eventor.look.draw", "eventor.look.picture"} & set(sys.modules)
        eventor.Graph
        assert "eventor.look.draw" in sys.modules
        eventor.Grahp
    """)
    assert "has no attribute 'Grahp'" in ran.stderr


def test_drawing_starts_no_thread_and_leaves_no_process(script):
    ran = script("""
        import os, eventor
        with eventor.Eventor(store=":memory:", config={"logdir": "logs"}) as ev:
            ev.add_assoc(ev.add_event("go"), ev.add_step("one", int))
            ev.graph().svg
        threads = "/proc/self/task"
        assert not os.path.exists(threads) or len(os.listdir(threads)) == 1
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("alone")
    """)
    assert ran.stdout == "alone\n", ran.stderr
