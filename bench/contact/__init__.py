"""The first contact with a GPU, stage by stage; ``bench/first_contact.py`` is the command.

- ``document``: the one JSON file, written anew after every item
- ``pool``: the processes of a stage, with their deadlines
- ``__main__``: such a process; ``report`` is how it tells what it found
- ``device``: all that only a GPU does, and its stand-in for a rehearsal
- ``versions``, ``kernels_once``, ``tiles``, ``network``, ``tests``, ``timings``, ``alternatives``, ``profile``: a file
  per stage, each with ``units(report)``, the names of its pieces of work, and ``run(unit, report)``
- ``verdict``: what is printed in the end

The command imports ``document``, ``pool`` and ``verdict`` only, which need nothing but Python's own library: torch may
be what fails.
"""
