"""Draws docs/floors.svg from the imports of the package: ``python docs/draw_floors.py``."""

import ast
import importlib.util
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_peft"
ROW, LEFT, RIGHT, ARCS = 46, 20, 600, 330  # heights and widths [px]


def floors() -> list[str]:
    """Return the folders from the lowest to the highest, as ``tests/test_imports.py`` has them."""
    spec = importlib.util.spec_from_file_location("test_imports", ROOT / "tests/test_imports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.FLOORS)


def imports(floor: str) -> Counter[str]:
    """Return how often the files of a floor import from each other one."""
    found: Counter[str] = Counter()
    for file in sorted([*(PACKAGE / floor).rglob("*.py"), *PACKAGE.glob(f"{floor}.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_peft"):
                found.update(f"{node.module}.{alias.name}".split(".")[1] for alias in node.names)
    del found[floor]
    return found


def headline(floor: str) -> str:
    """Return the first sentence of a floor's docstring."""
    file = PACKAGE / floor / "__init__.py"
    text = ast.get_docstring(ast.parse((file if file.exists() else PACKAGE / f"{floor}.py").read_text())) or ""
    return text.split("\n")[0]


def draw() -> str:
    """Return the picture: a box for each floor, and an arc for each pair of which one imports from the other."""
    order = floors()[::-1]
    middle = {floor: 20 + ROW * i + ROW // 2 for i, floor in enumerate(order)}
    height = 40 + ROW * len(order)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {RIGHT + ARCS} {height}" font-family="sans-serif">',
        f'<rect width="{RIGHT + ARCS}" height="{height}" fill="white"/>',
    ]
    for floor in order:
        y = middle[floor] - ROW // 2 + 4
        parts += [
            f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{ROW - 8}" rx="5" fill="#eef2f7" stroke="#8aa"/>',
            f'<text x="{LEFT + 10}" y="{y + 16}" font-size="14" font-weight="bold">{floor}</text>',
            f'<text x="{LEFT + 10}" y="{y + 31}" font-size="10.5" fill="#444">{escape(headline(floor))}</text>',
        ]
    known = set(order)
    for floor in order:
        for other, count in sorted(imports(floor).items()):
            if other in known:
                top, bottom = middle[floor] + 6, middle[other] - 6
                reach = RIGHT + 24 + (bottom - top) * 0.44
                width = 0.4 * min(count.bit_length(), 7)  # its logarithm: one import more changes little
                parts.append(
                    f'<path d="M {RIGHT} {top} C {reach:.0f} {top}, {reach:.0f} {bottom}, {RIGHT} {bottom}" '
                    f'fill="none" stroke="#2a6f97" stroke-width="{width:.2f}" opacity="0.55">'
                    f"<title>{floor} imports from {other}</title></path>"
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs/floors.svg").write_text(draw())
