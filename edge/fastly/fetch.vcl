# Of Cache-Control, Fastly's caches follow max-age, s-maxage and private, and not no-store: an answer that must not be
# kept (media under a revoked key while players go over to its successor, a check value, an error) would be kept.
if (beresp.http.Cache-Control ~ "(?i)(private|no-store)") {
  return(pass);
}
