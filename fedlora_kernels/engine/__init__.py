"""What stands behind `aggregate`: clients admitted, slabs streamed, passes made, an output built, a report written.

One noun per file: settings, clients, cohort, policy, slabs, walk, survey, combine, extras, faults, output, report,
result; `run` joins them.
"""
