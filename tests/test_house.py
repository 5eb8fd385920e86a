"""The laws of the house, read from the source without running it.

Each law is a function that yields its breaches in one module; the test names
the law and says how to mend a breach. `COUNTEREXAMPLES` keeps the laws honest:
one that no longer sees what it forbids fails there.
"""

import ast
import dataclasses
import importlib
import pathlib
import re
import symtable
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "keras_batchsize"
# Programs that import those beside them.
PROGRAMS = ("benchmarks", "examples")

# Ground floor first. A room imports only from floors below its own, never from
# its neighbours: what two of them share has a floor beneath them. The picture
# is in docs/design.md.
FLOORS = (
    ("_checks", "_figures", "_version"),
    ("clock", "measuring", "noise", "plan", "scaling", "throughput"),
    ("batch_profile", "policies", "records", "size_search"),
    ("controller", "report", "tensorboard"),
    # From here on TensorFlow and Keras may be imported.
    ("out_of_memory", "keras_private", "slicing"),
    ("model_state", "replicas", "workers"),
    ("distributed", "exactness", "learning_rate", "superbatches"),
    ("gradients", "requirements"),
    ("replica_graphs", "update_graphs"),
    ("train_function",),
    ("memory",),
    ("callbacks",),
    ("trainer",),
    ("tuner",),
    ("__init__",),
)
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FIRST_WITH_TENSORFLOW = FLOOR_OF["keras_private"]

# Names that Keras documents, so a subclass need not repeat what they are for.
KERAS_CONTRACT = re.compile(r"on_\w+|set_(model|params)|(get|from)_config")
NAMEDTUPLE_CONTRACT = {"_asdict", "_fields", "_make", "_replace"}
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 40


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the package, parsed.

    Attributes:
        name: Dotted path inside the package: `noise`, `tensorboard.plugin`,
            `__init__` for the package itself.
        path: File, relative to the root of the repository.
        source: Text of the file.
        is_package: Whether the file is the `__init__.py` of a folder.
    """

    name: str
    path: pathlib.Path
    source: str
    is_package: bool = False

    @property
    def tree(self):
        return ast.parse(self.source)

    @property
    def room(self):
        return room_of(self.name)


def room_of(module_name):
    """The room of a module, which may be furnished with several modules.

    A folder is one room, and so is `report.py` with `_report_text.py`.
    """
    first = module_name.split(".")[0]
    if first in FLOOR_OF:
        return first
    owners = [room for room in FLOOR_OF if first.startswith(f"_{room}_")]
    return max(owners, key=len, default=first)


def read_package():
    folder = ROOT / PACKAGE
    modules = []
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder).with_suffix("")
        is_package = inside.name == "__init__"
        parts = inside.parts[:-1] if is_package else inside.parts
        modules.append(
            Module(
                name=".".join(parts) or "__init__",
                path=file.relative_to(ROOT),
                source=file.read_text(encoding="utf-8"),
                is_package=is_package,
            )
        )
    return modules


MODULES = read_package()


def assert_kept(law, remedy, modules=MODULES):
    breaches = [
        f"  {module.path}:{line}: {what}"
        for module in modules
        for line, what in law(module)
    ]
    assert not breaches, "\n".join([remedy, *breaches])


# Imports.


def imports(module):
    """Yields (line, dotted module, name or None) of every import statement."""
    package = [PACKAGE, *module.name.split(".")]
    if module.name == "__init__":
        package = [PACKAGE]
    elif not module.is_package:
        package = package[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package of the module, each further dot its parent.
            base = package[: len(package) + 1 - node.level]
            base = base if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, source, alias.name


def own_imports(module):
    """Yields (line, module name) of every import from the package itself."""
    for line, source, name in imports(module):
        if source.split(".")[0] != PACKAGE:
            continue
        inside = source.split(".")[1:]
        # `from keras_batchsize import x` means the module x where there is
        # one; any other x comes from the package itself, at the top.
        if not inside and name and room_of(name) in FLOOR_OF:
            inside = [name]
        yield line, ".".join(inside) or "__init__"


def imports_against_the_floors(module):
    if module.room not in FLOOR_OF:
        return
    for line, name in own_imports(module):
        room = room_of(name)
        if room == module.room:
            continue
        # A module without a floor has a test of its own.
        if FLOOR_OF.get(room, -1) >= FLOOR_OF[module.room]:
            yield line, f"`{module.room}` imports `{name}`"


def test_imports_go_only_to_lower_floors():
    assert_kept(
        imports_against_the_floors,
        "A room imports only from floors below its own (docs/design.md). Move "
        "the shared part down, or hand it in as an argument:",
    )


def modules_without_a_floor(module):
    if module.room not in FLOOR_OF:
        yield 1, f"`{module.name}` is on no floor"


def test_every_module_has_a_floor():
    assert_kept(
        modules_without_a_floor,
        "Give it a floor: add the module to FLOORS in tests/test_house.py and "
        "to the rooms in docs/design.md:",
    )


def tensorflow_imports(module):
    if FLOOR_OF.get(module.room, len(FLOORS)) >= FIRST_WITH_TENSORFLOW:
        return
    for line, source, _ in imports(module):
        if source.split(".")[0] in ("keras", "keras_tuner", "tensorflow", "tf"):
            yield line, f"`{module.name}` imports `{source}`"


def test_estimates_and_decisions_need_no_tensorflow():
    assert_kept(
        tensorflow_imports,
        "Estimating, deciding and reporting is plain Python on float64. Take "
        "the number in a TensorFlow room and hand it over:",
    )


def private_keras_imports(module):
    if module.room == "keras_private":
        return
    for line, source, name in imports(module):
        parts = [*source.split("."), *filter(None, [name])]
        if parts[0] not in ("keras", "tensorflow"):
            continue
        if parts[1:2] in (["src"], ["python"]) or any(
            re.match(r"_(?!_)", part) for part in parts
        ):
            yield line, f"`{'.'.join(parts)}`"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "keras.src",
            "tf.python",
        ):
            yield node.lineno, f"`{ast.unparse(node)}`"


def defined_names(nodes):
    """Names of functions, of what is assigned to, and of class bodies."""
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    # Attributes of a class body, fields of dataclasses among them.
    return names | {node.id for node in nodes if isinstance(node, ast.Name)}


def foreign_private_attributes(module):
    """Yields `model._name` and the like: private names that are not ours.

    Names that the module itself defines are its own, on whatever object; in
    a part of a room also those of the room that it belongs to.
    """
    if module.room == "keras_private":
        return
    nodes = list(ast.walk(module.tree))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = defined_names(nodes)
    if module.name != module.room:
        for other in MODULES:
            if other.name == module.room:
                own |= defined_names(list(ast.walk(other.tree)))
    for node in attributes:
        is_private = re.match(r"_(?!_)", node.attr)
        if is_private and node.attr not in own | NAMEDTUPLE_CONTRACT:
            yield node.lineno, f"`{ast.unparse(node)}`"


@pytest.mark.parametrize(
    "law", [private_keras_imports, foreign_private_attributes]
)
def test_private_keras_names_live_in_keras_private(law):
    assert_kept(
        law,
        "A new Keras may rename what is private. Reach for it in "
        "keras_private.py, with a test that notices, and use it from there:",
    )


# What is not written here.


def asserts(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, ast.unparse(node.test)


def test_no_assert_in_the_package():
    assert_kept(
        asserts,
        "`python -O` removes asserts, and they say nothing to a user. Raise "
        "ValueError or TypeError with constraint, `Received:` and remedy:",
    )


def calls(module, name):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node.lineno, ast.unparse(node)


def prints(module):
    return calls(module, "print")


def test_no_print_in_the_package():
    assert_kept(
        prints,
        "A library speaks where Keras speaks: take a `print_fn`, or use "
        "`keras.utils` output or `warnings`:",
    )


def type_sniffing(module):
    return calls(module, "hasattr")


def test_no_hasattr_in_the_package():
    assert_kept(
        type_sniffing,
        "Ask for the type with `isinstance`, or give the base class the "
        "method; `hasattr` hides which kinds are meant:",
    )


def logging_configuration(module):
    return calls(module, "logging.basicConfig")


def test_no_logging_configuration_in_the_package():
    assert_kept(
        logging_configuration,
        "Logging is configured by the application. Use "
        "`logging.getLogger(__name__)` and nothing else:",
    )


def globals_(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, ast.unparse(node)


def test_no_global_in_the_package():
    assert_kept(
        globals_,
        "State has one owner: keep it in the object whose state it is:",
    )


def bare_excepts(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "except:"


def test_no_bare_except_in_the_package():
    assert_kept(
        bare_excepts,
        "A bare except swallows Ctrl-C. Name the exceptions that are "
        "expected, or restore state in `finally`:",
    )


# Sizes.


def long_modules(module):
    lines = len(module.source.splitlines())
    if lines > MAX_MODULE_LINES:
        yield 1, f"{lines} lines"


def test_modules_have_at_most_400_lines():
    assert_kept(
        long_modules,
        "A module is read in one sitting. Move a part of it into a module of "
        "the same room, as `_report_text.py` is part of `report.py`:",
    )


def code_lines(function, source_lines):
    """Lines of a function without its docstring, comments and blank lines."""
    lines = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    texts = (source_lines[line - 1].strip() for line in lines)
    return sum(bool(text) and not text.startswith("#") for text in texts)


def long_functions(module):
    source_lines = module.source.splitlines()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = code_lines(node, source_lines)
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"`{node.name}` has {lines} lines"


def test_functions_have_at_most_40_lines_of_code():
    assert_kept(
        long_functions,
        "Docstring, comments and blank lines are free. Give the parts of the "
        "function names of their own:",
    )


# Docstrings.


def documented_methods(modules):
    """Method names with a docstring of every class, and its base classes."""
    methods, bases = {}, {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                methods[node.name] = {
                    item.name
                    for item in node.body
                    if isinstance(item, ast.FunctionDef)
                    and ast.get_docstring(item)
                }
                bases[node.name] = [
                    ast.unparse(base).split(".")[-1] for base in node.bases
                ]
    return methods, bases


DOCUMENTED_METHODS, BASES = documented_methods(MODULES)


def is_explained_by_a_base(class_name, method):
    return any(
        method in DOCUMENTED_METHODS.get(base, ())
        or is_explained_by_a_base(base, method)
        for base in BASES.get(class_name, ())
    )


def undocumented(body, owner=None):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.lineno, f"class `{node.name}`"
            yield from undocumented(node.body, node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        decorators = [ast.unparse(item) for item in node.decorator_list]
        if (
            ast.get_docstring(node)
            or node.name.startswith("_")
            or f"{node.name}.setter" in decorators
        ):
            continue
        if owner and (
            owner.bases
            and KERAS_CONTRACT.fullmatch(node.name)
            or is_explained_by_a_base(owner.name, node.name)
        ):
            continue
        place = f"{owner.name}." if owner else ""
        yield node.lineno, f"`{place}{node.name}`"


def missing_docstrings(module):
    if not ast.get_docstring(module.tree):
        yield 1, f"module `{module.name}`"
    yield from undocumented(module.tree.body)


def test_every_public_name_has_a_docstring():
    assert_kept(
        missing_docstrings,
        "Say what it does, with the unit of every number. Overridden methods "
        "are explained by their base class, Keras's hooks by Keras:",
    )


# Programs.


def read_programs():
    return [
        Module(file.stem, file.relative_to(ROOT), file.read_text("utf-8"))
        for folder in PROGRAMS
        for file in sorted((ROOT / folder).glob("*.py"))
    ]


def taken_from_others(module):
    """Yields (line, module, name) of what a program takes from any other."""
    called, nodes = {}, list(ast.walk(module.tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                called[alias.asname or alias.name] = alias.name
    for line, source, name in imports(module):
        if name:
            yield line, source, name
    for node in nodes:
        if isinstance(node, ast.Attribute):
            source = called.get(ast.unparse(node.value))
            if source:
                yield node.lineno, source, node.attr


def names_at_the_top(file):
    """Names that a file defines, assigns to or imports at its top level."""
    source = file.read_text(encoding="utf-8")
    return {
        symbol.get_name()
        for symbol in symtable.symtable(source, str(file), "exec").get_symbols()
        if symbol.is_assigned() or symbol.is_imported()
    }


def missing_in_a_sibling(module):
    """Yields `speed.x` where the file beside it, speed.py, has no x."""
    folder = ROOT / module.path.parent
    for line, source, name in taken_from_others(module):
        file = folder / f"{source}.py"
        if file.exists() and name not in names_at_the_top(file):
            yield line, f"`{source}.{name}`"


def test_programs_take_from_each_other_what_there_is():
    assert_kept(
        missing_in_a_sibling,
        "No test runs a benchmark as a whole, and this one would end with an "
        "AttributeError. Give the file beside it the name, or use another:",
        read_programs(),
    )


# The package as a whole.


def literal(module_name, variable):
    """The value of a module's variable, which must be a literal."""
    for module in MODULES:
        if module.name == module_name:
            for node in module.tree.body:
                if isinstance(node, ast.Assign) and variable in map(
                    ast.unparse, node.targets
                ):
                    return ast.literal_eval(node.value)
    pytest.fail(f"{module_name} of {PACKAGE} assigns no literal to {variable}.")


def test_public_names_are_sorted():
    names = literal("__init__", "__all__")
    assert list(names) == sorted(set(names)), (
        "Sort `__all__` of the package as `sorted` does, so that additions "
        "never meet in a merge."
    )


def test_public_names_exist():
    package = importlib.import_module(PACKAGE)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing, f"`__all__` names what the package lacks: {missing}"


def imports_for_type_checkers():
    """The `if typing.TYPE_CHECKING` imports of the package: name to home."""
    package = next(module for module in MODULES if module.name == "__init__")
    block = next(node for node in package.tree.body if isinstance(node, ast.If))
    homes = {}
    for node in ast.walk(block):
        if isinstance(node, ast.ImportFrom):
            home = node.module.removeprefix(PACKAGE).removeprefix(".")
            homes.update({alias.name: home for alias in node.names})
    return homes


def test_type_checkers_see_what_is_imported_on_demand():
    homes = imports_for_type_checkers()
    assert {*homes, "__version__"} == set(literal("__init__", "__all__")), (
        "`__all__` and the imports below `typing.TYPE_CHECKING` must agree."
    )
    in_modules = {name: home for name, home in homes.items() if home}
    assert in_modules == literal("__init__", "_HOMES"), (
        "`_HOMES` must name the module of each name imported for checkers."
    )


def test_import_takes_no_tensorflow(run_python):
    # TensorBoard imports the package to find our page, and may run where
    # there is no TensorFlow.
    script = textwrap.dedent(f"""
        import sys

        import {PACKAGE}
        from {PACKAGE} import noise
        from {PACKAGE} import policies

        assert not {{"tensorflow", "keras"}} & set(sys.modules)
        assert set({PACKAGE}.__all__) <= set(dir({PACKAGE}))
    """)
    process = run_python("-c", script)
    assert process.returncode == 0, process.stderr


def test_import_leaves_the_optional_parts_alone(run_python):
    # Keras imports matplotlib itself where it is installed, so what is loaded
    # afterwards tells nothing; what is missed does. Nobody else imports
    # KerasTuner, and what is loaded tells even of an import whose error is
    # caught.
    optional = ("matplotlib", f"{PACKAGE}.tensorboard.plugin")
    script = textwrap.dedent(f"""
        import sys

        sys.modules.update(dict.fromkeys({optional}))
        from {PACKAGE} import *
        if "keras_tuner" in sys.modules:
            sys.exit("It imports keras_tuner.")
    """)
    process = run_python("-c", script)
    assert process.returncode == 0, (
        f"`import {PACKAGE}` imports KerasTuner, needs one of {optional}, or "
        "fails for another reason. Import these inside the function that needs "
        "them.\n\n"
        f"{process.stderr}"
    )


def test_changelog_tells_of_this_version():
    version = literal("_version", "__version__")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert {version, "Unreleased"}.intersection(headings), (
        f"CHANGELOG.md needs a section `## [{version}]` or `## [Unreleased]`."
    )


# The laws themselves.

COUNTEREXAMPLES = [
    (imports_against_the_floors, "noise", "from keras_batchsize import plan"),
    (imports_against_the_floors, "noise", "from keras_batchsize import fit"),
    (imports_against_the_floors, "plan", "import keras_batchsize.policies"),
    (imports_against_the_floors, "memory", "from . import callbacks"),
    (imports_against_the_floors, "policies", "from .trainer import fit"),
    (imports_against_the_floors, "tensorboard.page", "from .. import tuner"),
    (imports_against_the_floors, "_report_text", "from . import callbacks"),
    (modules_without_a_floor, "utils", ""),
    (tensorflow_imports, "controller", "def f():\n    import keras.ops"),
    (tensorflow_imports, "_report_plot", "from tensorflow import io"),
    (private_keras_imports, "memory", "from keras.src import tree"),
    (private_keras_imports, "memory", "from keras.ops import _shape"),
    (private_keras_imports, "memory", "from tensorflow.python import eager"),
    (private_keras_imports, "memory", "keras.src.tree"),
    (foreign_private_attributes, "memory", "model._loss_tracker"),
    (foreign_private_attributes, "memory", "self._distribute_strategy.scope()"),
    (asserts, "noise", "assert 1"),
    (prints, "noise", "print(1)"),
    (type_sniffing, "noise", "hasattr(1, 'x')"),
    (logging_configuration, "noise", "logging.basicConfig()"),
    (globals_, "noise", "def f():\n    global x"),
    (bare_excepts, "noise", "try:\n    f()\nexcept:\n    pass"),
    (long_modules, "noise", "x = 1\n" * (MAX_MODULE_LINES + 1)),
    (
        long_functions,
        "noise",
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
    ),
    (missing_docstrings, "noise", "x = 1"),
    (missing_docstrings, "noise", "'''Doc.'''\ndef f(): pass"),
    (missing_docstrings, "noise", "'''Doc.'''\nclass A: pass"),
    (missing_in_a_sibling, "benchmarks/new", "import speed\nspeed.typical"),
    (missing_in_a_sibling, "benchmarks/new", "import speed as s\ns.typical"),
    (missing_in_a_sibling, "benchmarks/new", "from speed import typical"),
    (missing_in_a_sibling, "examples/new", "import tune\ntune.nothing()"),
    (
        missing_docstrings,
        "noise",
        "'''Doc.'''\nclass A:\n    '''Doc.'''\n    def on_end(self): pass",
    ),
]


@pytest.mark.parametrize(
    ("law", "module_name", "source"),
    COUNTEREXAMPLES,
    ids=[f"{law.__name__}-{i}" for i, (law, *_) in enumerate(COUNTEREXAMPLES)],
)
def test_law_sees_its_breach(law, module_name, source):
    module = Module(module_name, pathlib.Path(f"{module_name}.py"), source)
    assert len(list(law(module))) == 1


ALLOWED = [
    ("noise", "from keras_batchsize import _checks"),
    ("policies", "from .noise import gradient_moments"),
    ("train_function", "from . import learning_rate, keras_private"),
    ("tensorboard.page", "from keras_batchsize.tensorboard import writer"),
    ("report", "from keras_batchsize import _report_text"),
]


@pytest.mark.parametrize(("module_name", "source"), ALLOWED)
def test_floors_leave_the_stairs_free(module_name, source):
    module = Module(module_name, pathlib.Path(f"{module_name}.py"), source)
    assert not list(imports_against_the_floors(module))
