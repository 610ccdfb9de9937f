"""The page's server, and the same page as a static site: what they serve is listed once, before the first request."""
