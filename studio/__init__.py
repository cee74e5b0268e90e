"""A page in the browser where a person makes talking-avatar videos with any endpoint."""
