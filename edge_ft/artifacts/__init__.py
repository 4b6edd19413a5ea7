"""Run folders and bundles on disk.

Reports and manifests are read and written only here; `docs/bundle.md` describes the bundle.
"""

from edge_ft.artifacts.bundle import FORMAT_VERSION, Bundle, is_added
from edge_ft.artifacts.kinds import kind_of
from edge_ft.artifacts.run_folder import RunFolder

__all__ = ["FORMAT_VERSION", "Bundle", "RunFolder", "is_added", "kind_of"]
