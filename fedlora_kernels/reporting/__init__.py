"""Reports on a run: terminal tables, JSON with a published schema, and a page for a browser."""

from fedlora_kernels.reporting.schemas import schema as schema
