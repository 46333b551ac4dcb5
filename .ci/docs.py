"""Write the API reference, from the docstrings, into build/docs."""

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pdoc

import frpo

for found in walk_packages(frpo.__path__, "frpo."):
    if found.ispkg:
        # pdoc shows what `__all__` names and nothing else; these packages load those names on demand.
        vars(import_module(found.name)).pop("__all__", None)
del frpo.__all__

pdoc.render.configure(docformat="google", footer_text=f"frpo {frpo.__version__}")
pdoc.pdoc("frpo", output_directory=Path("build/docs"))
