"""`lit-palm new-objective NAME`: write a package with an objective that installs, trains and passes its tests.

    names.py      from what the user typed to package, module and class; which names are taken
    package.py    the files of a package, from templates
    command.py    the command line
    templates/    the files, as string.Template; `.tmpl` keeps linters and test runners away

What it writes is an ordinary plugin: it uses lit_palm's public names and nothing here knows about it afterwards.
"""

from lit_palm.scaffold.command import main
from lit_palm.scaffold.names import Names, check_free, names_for
from lit_palm.scaffold.package import KINDS, Author, render, write_package

__all__ = ["KINDS", "Author", "Names", "check_free", "main", "names_for", "render", "write_package"]
