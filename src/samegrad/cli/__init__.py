"""The command line. ``main.py`` picks a subcommand and imports its file only then.

    main.py        names → files, exit codes, the last line of defence
    boundary.py    what ends a command, and the exit code and text it becomes
    console.py     results on stdout, everything else on stderr
    options.py     flags shared by commands; flags + environment + files → one resolved set with origins
    mistakes.py    what is wrong with them, all of it at once
    values.py      text → typed value, one rule for flags, environment and files
    config_files.py   YAML and JSON with lines, strict
    output_folder.py  where results go, checked before the work
    target.py      a recipe's name or ``file.py:function``
    devices.py     devices of torch's, and cards that are only planned for
    planned.py     a program's step with its plan; ahead.py the same for a card; measured.py as measured and followed
    run_session.py one run in its folder; run_loop.py its steps
    schedulers.py  learning-rate schedulers of a user's own program
    stopping.py    SIGTERM and Ctrl-C → a flag read between steps

Nothing here imports torch at module level except through a subcommand that runs a step.
"""
