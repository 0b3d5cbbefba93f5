"""The book's own code: studies, findings, tables and figures. It imports cddlib, which does not know it."""
