"""The embedded model: a small MolmoE that travels with the package and answers questions about digits."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "assets" / "embedded"
