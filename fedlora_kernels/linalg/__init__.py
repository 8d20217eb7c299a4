"""The kernel API: validated, batched, framework-neutral linear algebra on stacked low-rank factors."""
