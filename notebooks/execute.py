"""Execute the notebooks beside this file, in place; with --check, fail where one raises and leave the files alone."""

import argparse
import pathlib

import nbformat
from nbclient import NotebookClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="all where none is named")
    args = parser.parse_args()
    for path in args.notebooks or sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps would change at every run
            if "outputs" in cell:  # progress bars are for those who wait
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        if not args.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {sum(c.cell_type == 'code' for c in notebook.cells)} cells ran")


if __name__ == "__main__":
    main()
