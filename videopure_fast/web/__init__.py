"""What is looked at in a browser: the page of the service, the report of results, and their one style."""
