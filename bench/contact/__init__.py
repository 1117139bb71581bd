"""The first contact with a GPU, stage by stage; ``bench/first_contact.py`` is the command.

- ``document``: the one JSON file, written anew after every item
- ``pool``: the processes of a stage, with their deadlines
- ``__main__``: such a process; ``report`` sends its results
- ``device``: all that only a GPU does, and its stand-in for a rehearsal
- ``versions``, ``kernels_once``, ``tiles``, ``network``, ``tests``, ``timings``, ``alternatives``, ``profile``: a file
  per stage, each with ``units(report)``, the names of its pieces of work, and ``run(unit, report)``
- ``verdict``: the text at the end

The command imports only ``document``, ``pool`` and ``verdict``, which need nothing but Python's standard library,
because torch itself may fail.
"""
