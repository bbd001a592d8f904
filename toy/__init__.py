"""The toy task: an invented world whose facts can only be looked up, and a small body pre-trained for it.

To make another task, copy the folder: world.py has the questions and the search engine, words.py the prompts,
texts.py the texts of pre-training; make.py makes body/.
"""

import cli  # noqa: F401 (says that torch is being loaded)
