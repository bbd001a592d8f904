"""The toy task: a world whose facts only a search can tell, and a small body that speaks of it.

To make another task, copy the folder: world.py has the questions and the engine, words.py what each role is
told, texts.py what the body learns; make.py makes body/.
"""

import cli  # noqa: F401 (says that torch is being loaded)
