"""What stands behind `aggregate`: clients admitted, slabs streamed, passes made, an output built, a report written.

One noun per file: settings, clients, slabs, passes, extras, output, report, result; `run` joins them.
"""
