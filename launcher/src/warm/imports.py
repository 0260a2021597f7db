# What `--preload auto` imports: the installed modules that the text of the program names.
#
# The program is not run. Its own modules are read as well, and not imported: they may be edited before
# the next restart. Only statements that are reached in any case count: those of a file's top level, and
# those within `try` there.

# Files and bytes of a file that are read at most.
MOST_FILES, MOST_BYTES = 1000, 1 << 20


def found_imports():
    """Returns the modules as pairs of a name and the names that are taken from it, in order of import."""
    import importlib.util
    from importlib.machinery import PathFinder

    found, seen = {}, set()

    def locate(name):
        """The spec of a module. None of the packages that it belongs to is imported."""
        first, *parts = name.split('.')
        spec = importlib.util.find_spec(first)
        for part in parts:
            if spec is None or not spec.submodule_search_locations:
                return None
            first += '.' + part
            spec = PathFinder.find_spec(first, list(spec.submodule_search_locations))
        return spec

    def visit(name, taken):
        root = name.partition('.')[0]
        try:
            spec = locate(root)
            if spec is None or is_of_the_interpreter(root, spec):
                return
            if is_installed(spec):
                return found.setdefault(name, []).extend(taken)
            parts = name.split('.')
            for count in range(1, len(parts) + 1):
                read(locate('.'.join(parts[:count])))
            for word in taken:
                read(locate(name + '.' + word))
        except Exception:
            # The program reports what it cannot import.
            return

    def read(spec):
        if spec is not None and isinstance(spec.origin, str) and spec.origin.endswith('.py'):
            package = spec.name if spec.submodule_search_locations else spec.name.rpartition('.')[0]
            walk(spec.origin, package)

    def walk(path, package):
        if path in seen or len(seen) == MOST_FILES:
            return
        seen.add(path)
        for node in top_level(path):
            for name, taken in imported(node, package):
                visit(name, taken)

    if kind == 'script':
        walk(program, '')
    else:
        spec = locate(program)
        read(spec)
        if spec is not None and spec.submodule_search_locations:
            read(locate(program + '.__main__'))
    return list(found.items())


def top_level(path):
    """Statements of a file that an import of it always reaches."""
    import ast
    try:
        with open(path, 'rb') as file:
            waiting = ast.parse(file.read(MOST_BYTES)).body[::-1]
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Try):
            waiting.extend(node.body[::-1])
        yield node


def imported(node, package):
    """Names of modules in an import statement, each with the names that are taken from it."""
    import ast
    if isinstance(node, ast.Import):
        return [(alias.name, []) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = [node.module] if node.module else []
    if node.level:
        above = package.split('.')
        parts = above[:len(above) - node.level + 1] + parts
    return [('.'.join(parts), [alias.name for alias in node.names if alias.name != '*'])] if parts else []


def is_of_the_interpreter(root, spec):
    if root in getattr(sys, 'stdlib_module_names', sys.builtin_module_names) or spec.origin in ('built-in', 'frozen'):
        return True
    library = os.path.dirname(os.path.realpath(os.__file__)) + os.sep
    return os.path.realpath(spec.origin or '').startswith(library) and not is_installed(spec)


def is_installed(spec):
    places = [spec.origin or ''] + list(spec.submodule_search_locations or [])
    return any(part in ('site-packages', 'dist-packages') for place in places for part in place.split(os.sep))
