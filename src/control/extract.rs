//! What a request says, taken out of it: the stream's ID, the page of a list, the JSON body.
//!
//! Every refusal is a [`Problem`] that names the field; axum's own plain-text ones never get out. JSON is taken
//! strictly: unknown and doubled fields, `null` and arrays in an object's place are errors, because a mistyped
//! setting that is silently ignored is found out in production. Deliberately absent: what values mean.

use std::marker::PhantomData;
use std::{fmt, str};

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use url::form_urlencoded;

use super::problem::{Faults, Kind, Problem};
use crate::keys::{Ordinal, StreamId};

/// The longest body that is read: a call's JSON is a hundredth of it.
pub(super) const MAX_BODY_BYTES: usize = 64 << 10;
const DEFAULT_LIMIT: usize = 100;
pub(super) const MAX_LIMIT: usize = 1_000;

/// The stream that the path names.
pub(super) struct AtStream(pub(super) StreamId);

impl<S: Send + Sync> FromRequestParts<S> for AtStream {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let wrong = |why: String| Faults::of("streamId", why);
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| wrong(rejection.body_text()))?;
        text.parse().map(Self).map_err(|error: crate::keys::IdError| wrong(format!("is wrong: {error}")))
    }
}

/// Where a list goes on.
pub(super) trait Cursor: Sized {
    /// The query parameter.
    const NAME: &'static str;

    /// # Errors
    /// What is wrong with the text.
    fn parse(text: &str) -> Result<Self, String>;
}

impl Cursor for StreamId {
    const NAME: &'static str = "after";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: crate::keys::IdError| format!("is wrong: {error}"))
    }
}

impl Cursor for Ordinal {
    const NAME: &'static str = "before";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map(Ordinal).map_err(|_| format!("must be between 0 and {}", u32::MAX))
    }
}

/// The page of a list that the query asks for.
pub(super) struct Page<C> {
    pub(super) cursor: Option<C>,
    pub(super) limit: usize,
}

impl<C: Cursor> Page<C> {
    fn parse(query: &str) -> Result<Self, Problem> {
        let mut faults = Faults::default();
        let (mut cursor, mut limit) = (None, None);
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let outcome = match &*name {
                "limit" if limit.is_none() => {
                    let number = value.parse().ok().filter(|n| (1..=MAX_LIMIT).contains(n));
                    limit = Some(number.unwrap_or(DEFAULT_LIMIT));
                    number.map(drop).ok_or_else(|| format!("must be between 1 and {MAX_LIMIT}"))
                }
                name if name == C::NAME && cursor.is_none() => {
                    let parsed = C::parse(&value);
                    parsed.map(|value| cursor = Some(value))
                }
                name if name == "limit" || name == C::NAME => Err("is given twice".to_owned()),
                _ => Err(format!("is not known here: limit and {} are", C::NAME)),
            };
            if let Err(why) = outcome {
                faults.add(name, why);
            }
        }
        faults.none()?;
        Ok(Self { cursor, limit: limit.unwrap_or(DEFAULT_LIMIT) })
    }

    /// One more than the page has room for: whether there is a next page shows in it.
    pub(super) fn asked(&self) -> usize {
        self.limit + 1
    }

    /// Cuts what was found to the page, and tells the cursor of the next one.
    pub(super) fn cut<T, N>(&self, found: &mut Vec<T>, cursor_of: impl Fn(&T) -> N) -> Option<N> {
        let more = found.len() > self.limit;
        found.truncate(self.limit);
        found.last().filter(|_| more).map(cursor_of)
    }
}

impl<S: Send + Sync, C: Cursor> FromRequestParts<S> for Page<C> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        Self::parse(parts.uri.query().unwrap_or_default())
    }
}

/// The body, which must be a JSON object.
pub(super) struct JsonBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::new(Kind::NotJson, "send the body with Content-Type: application/json"));
        }
        let body =
            Bytes::from_request(request, state).await.map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    Problem::new(Kind::TooLarge, format!("a body has at most {MAX_BODY_BYTES} bytes"))
                }
                _ => Problem::new(Kind::BadJson, "the body broke off"),
            })?;
        parse_json(&body).map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media_type == "application/json"
        || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    if body.is_empty() {
        return Err(Problem::new(Kind::BadJson, "the body is empty; a JSON object is expected"));
    }
    let malformed = |error: &serde_json::Error| Problem::new(Kind::BadJson, format!("the body: {error}"));
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(value) = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        match error.inner() {
            data if data.is_data() => wrong_field(path, data),
            syntax => malformed(syntax),
        }
    })?;
    json.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn wrong_field(path: String, error: &serde_json::Error) -> Problem {
    let text = error.to_string();
    // The position is of use in text that is not JSON; here there is a path.
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    let mut field = if path == "." { String::new() } else { path };
    // serde names the object that lacks a field, an operator looks for the field.
    if let Some(missing) = text.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        field = if field.is_empty() { missing.to_owned() } else { format!("{field}.{missing}") };
        return Faults::of(field, "is missing");
    }
    if field.is_empty() {
        "body".clone_into(&mut field);
    }
    // Rust's name of the type is not JSON's.
    Faults::of(field, format!("is wrong: {}", text.replace("expected f64", "expected a number")))
}

/// A JSON object. Without this an array of the fields' values, in their order, would do as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfMap<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfMap<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_map(OfMap(PhantomData)).map(Object)
    }
}

/// For a field that may be left out, but not be `null`: whether that means "as it is" or "none" nobody can tell.
pub(super) fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// As [`present`], for a whole number. `5.0` is one (JSON Schema draft 2020-12 §6.3), and some languages write it
/// so.
pub(super) fn present_whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    struct Whole;
    impl Visitor<'_> for Whole {
        type Value = i64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number")
        }

        fn visit_i64<E>(self, number: i64) -> Result<i64, E> {
            Ok(number)
        }

        fn visit_u64<E>(self, number: u64) -> Result<i64, E> {
            // No bound here is anywhere near.
            Ok(i64::try_from(number).unwrap_or(i64::MAX))
        }

        fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<i64, E> {
            if number.fract() != 0.0 {
                return Err(E::invalid_type(Unexpected::Float(number), &self));
            }
            // Saturates, which is out of every bound too.
            Ok(number as i64)
        }
    }
    deserializer.deserialize_i64(Whole).map(Some)
}

/// As [`present`], for an object.
pub(super) fn present_object<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    Object::deserialize(deserializer).map(|Object(value)| Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default, deserialize_with = "present_object")]
        inner: Option<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Inner {
        #[serde(default, deserialize_with = "present_whole")]
        per_key: Option<i64>,
        needed: bool,
    }

    fn problem(body: &str) -> serde_json::Value {
        serde_json::to_value(parse_json::<Sample>(body.as_bytes()).unwrap_err()).unwrap()
    }

    #[test]
    fn what_is_wrong_in_a_body_names_its_field() {
        for (body, field, detail) in [
            (r#"{}"#, "name", "is missing"),
            (r#"{"name": 5}"#, "name", "is wrong: invalid type: integer `5`, expected a string"),
            (r#"{"name": "a", "nmae": 1}"#, "nmae", "unknown field"),
            (r#"{"name": "a", "name": "b"}"#, "body", "duplicate field `name`"),
            (r#"{"name": "a", "inner": {}}"#, "inner.needed", "is missing"),
            (r#"{"name": "a", "inner": {"perKey": "x"}}"#, "inner.perKey", "expected a whole number"),
            (r#"{"name": "a", "inner": {"perKey": null}}"#, "inner.perKey", "invalid type: null"),
            (r#"{"name": "a", "inner": {"perKey": 5.5}}"#, "inner.perKey", "floating point `5.5`"),
            (r#"{"name": "a", "inner": {"per_key": 1}}"#, "inner.per_key", "unknown field"),
            (r#"{"name": "a", "inner": null}"#, "inner", "expected an object"),
            (r#"{"name": "a", "inner": [1, true]}"#, "inner", "expected an object"),
            (r#"["a"]"#, "body", "expected an object"),
            (r#""a""#, "body", "expected an object"),
        ] {
            let problem = problem(body);
            assert_eq!(problem["status"], 422, "{body}");
            let error = &problem["errors"][0];
            assert_eq!(error["field"], field, "{body}: {error}");
            assert!(error["detail"].as_str().unwrap().contains(detail), "{body}: {error}");
            assert!(!error["detail"].as_str().unwrap().contains("at line"), "{error}");
        }
    }

    #[test]
    fn a_whole_number_is_one_however_it_is_written() {
        for (number, expected) in [
            ("5", 5),
            ("5.0", 5),
            ("-3", -3),
            ("2e2", 200),
            ("18446744073709551615", i64::MAX),
            ("1e300", i64::MAX),
        ] {
            let body = format!(r#"{{"name": "a", "inner": {{"needed": true, "perKey": {number}}}}}"#);
            let sample: Sample = parse_json(body.as_bytes()).unwrap();
            assert_eq!(sample.inner.unwrap().per_key, Some(expected), "{number}");
        }
    }

    #[test]
    fn what_is_not_json_names_line_and_column() {
        for (body, detail) in [
            ("{\n  \"name\": }", "line 2 column 11"),
            ("", "empty"),
            ("{\"name\": \"a\"} x", "line 1 column 15"),
            ("{\"name\": \"a\"", "line 1"),
            ("{\"name\": \"\\ud800\"}", "line 1"),
        ] {
            let problem = problem(body);
            assert_eq!(problem["status"], 400, "{body}");
            assert!(problem["detail"].as_str().unwrap().contains(detail), "{body}: {problem}");
        }
    }

    #[test]
    fn a_page_is_bounded_and_its_parameters_are_known() {
        let page = Page::<StreamId>::parse("limit=5&after=ch1").unwrap();
        assert_eq!((page.limit, page.cursor.unwrap().as_str()), (5, "ch1"));
        assert_eq!(Page::<Ordinal>::parse("").unwrap().limit, DEFAULT_LIMIT);
        for (query, field) in [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=", "limit"),
            ("limit=1&limit=2", "limit"),
            ("before=-1", "before"),
            ("before=4294967296", "before"),
            ("after=ch1", "after"),
            ("lmit=5", "lmit"),
        ] {
            let problem = Page::<Ordinal>::parse(query).err().unwrap();
            assert_eq!(problem.errors()[0].field, field, "{query}: {}", problem.detail());
        }
    }

    #[test]
    fn the_next_page_begins_behind_the_last_of_this_one() {
        let page = Page::<Ordinal> { cursor: None, limit: 2 };
        let mut found = vec![9, 8, 7];
        assert_eq!(page.cut(&mut found, |n| *n), Some(8));
        assert_eq!(found, [9, 8]);
        assert_eq!(page.cut(&mut vec![9, 8], |n| *n), None);
        assert_eq!(page.cut(&mut Vec::<u32>::new(), |n| *n), None);
    }

    #[test]
    fn a_json_type_is_one_whatever_its_parameters() {
        let is = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, value.parse().unwrap());
            is_json(&headers)
        };
        assert!(is("application/json") && is("Application/JSON; charset=utf-8") && is("application/x+json"));
        assert!(!is("text/json") && !is("application/x-www-form-urlencoded") && !is_json(&HeaderMap::new()));
    }
}
