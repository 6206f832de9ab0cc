//! Runs a program for one request: `vcl_recv`, and `vcl_error` where that raises an error.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use regex::Regex;

use super::functions;
use super::parse::{Expression, Program, Statement};

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    NotSet,
    Text(String),
    Number(i64),
    Bool(bool),
}

impl Value {
    pub fn text(&self) -> Result<&str, String> {
        match self {
            Value::Text(text) => Ok(text),
            Value::NotSet => Ok(""),
            other => Err(format!("{other:?} is no STRING")),
        }
    }

    pub fn number(&self) -> Result<i64, String> {
        match self {
            Value::Number(number) => Ok(*number),
            other => Err(format!("{other:?} is no INTEGER")),
        }
    }

    fn holds(&self) -> Result<bool, String> {
        match self {
            Value::Bool(value) => Ok(*value),
            Value::NotSet => Ok(false),
            Value::Text(_) => Ok(true),
            Value::Number(_) => Err("an INTEGER is no condition".into()),
        }
    }
}

/// A request as VCL sees it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// How many servers of this service it has come through.
    pub visits: i64,
}

/// An answer that the code itself gives.
#[derive(Debug, Clone, Default)]
pub struct Synthetic {
    pub status: i64,
    pub reason: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub enum Outcome {
    Answered(Synthetic),
    GoesOn,
}

/// What an edge has besides its code.
pub struct Edge<'a> {
    pub program: &'a Program,
    /// Dictionaries by name.
    pub dictionaries: &'a HashMap<String, HashMap<String, String>>,
    /// Seconds since 1970.
    pub now: i64,
}

enum Flow {
    Next,
    Error(i64, String),
    Return(String),
}

struct Run<'a> {
    edge: &'a Edge<'a>,
    request: &'a Request,
    locals: Vec<HashMap<String, Value>>,
    groups: Vec<Option<String>>,
    answer: Option<Synthetic>,
    /// Headers of the origin's answer, names in lower case.
    fetched: Option<&'a HashMap<String, String>>,
    log: Vec<String>,
}

impl Edge<'_> {
    /// Whether an answer of the origin's may be kept: all that `vcl_fetch` decides here.
    pub fn keeps(&self, request: &Request, headers: &HashMap<String, String>) -> Result<bool, String> {
        let mut run = Run {
            edge: self,
            request,
            locals: Vec::new(),
            groups: Vec::new(),
            answer: None,
            fetched: Some(headers),
            log: Vec::new(),
        };
        match run.subroutine("vcl_fetch")? {
            Flow::Next => Ok(true),
            Flow::Return(state) if state == "pass" => Ok(false),
            _ => Err("vcl_fetch does something else".into()),
        }
    }

    /// What becomes of a request, and what was logged.
    pub fn run(&self, request: &Request) -> Result<(Outcome, Vec<String>), String> {
        let mut run = Run {
            edge: self,
            request,
            locals: Vec::new(),
            groups: Vec::new(),
            answer: None,
            fetched: None,
            log: Vec::new(),
        };
        let (status, reason) = match run.subroutine("vcl_recv")? {
            Flow::Next => return Ok((Outcome::GoesOn, run.log)),
            Flow::Error(status, reason) => (status, reason),
            Flow::Return(state) => return Err(format!("vcl_recv returns {state}")),
        };
        run.answer = Some(Synthetic { status, reason, ..Synthetic::default() });
        match run.subroutine("vcl_error")? {
            Flow::Return(state) if state == "deliver" => {
                Ok((Outcome::Answered(run.answer.expect("it was made")), run.log))
            }
            _ => Err(format!("vcl_error does not answer {status}")),
        }
    }
}

impl Run<'_> {
    fn subroutine(&mut self, name: &str) -> Result<Flow, String> {
        let body = &self.edge.program.subroutines[name];
        self.locals.push(HashMap::new());
        let flow = self.block(body);
        self.locals.pop();
        flow
    }

    fn block(&mut self, body: &[Statement]) -> Result<Flow, String> {
        for statement in body {
            match self.statement(statement)? {
                Flow::Next => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, statement: &Statement) -> Result<Flow, String> {
        match statement {
            Statement::Declare(name, kind) => {
                let value = match &**kind {
                    "BOOL" => Value::Bool(false),
                    "INTEGER" => Value::Number(0),
                    _ => Value::NotSet,
                };
                self.locals.last_mut().expect("inside a subroutine").insert(name.clone(), value);
            }
            Statement::Set(name, expression) => {
                let value = self.value(expression)?;
                self.set(name, value)?;
            }
            Statement::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.value(condition)?.holds()? {
                        return self.block(body);
                    }
                }
                return self.block(otherwise);
            }
            Statement::Call(name) => return self.subroutine(name),
            Statement::Error(status, reason) => {
                return Ok(Flow::Error(*status, self.value(reason)?.text()?.to_owned()));
            }
            Statement::Return(state) => return Ok(Flow::Return(state.clone())),
            Statement::Log(line) => {
                let line = self.value(line)?;
                self.log.push(line.text()?.to_owned());
            }
            Statement::Synthetic(body, is_base64) => {
                let text = self.value(body)?.text()?.to_owned();
                let bytes = match is_base64 {
                    true => STANDARD.decode(text).map_err(|error| error.to_string())?,
                    false => text.into_bytes(),
                };
                self.object()?.body = bytes;
            }
        }
        Ok(Flow::Next)
    }

    fn object(&mut self) -> Result<&mut Synthetic, String> {
        self.answer.as_mut().ok_or_else(|| "there is no obj outside vcl_error".to_owned())
    }

    fn set(&mut self, name: &str, value: Value) -> Result<(), String> {
        if let Some(header) = name.strip_prefix("obj.http.") {
            let value = value.text()?.to_owned();
            self.object()?.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(header));
            self.object()?.headers.push((header.to_owned(), value));
            return Ok(());
        }
        match name {
            "obj.status" => self.object()?.status = value.number()?,
            "obj.response" => self.object()?.reason = value.text()?.to_owned(),
            _ => {
                let local = self.locals.last_mut().and_then(|locals| locals.get_mut(name));
                let local = local.ok_or_else(|| format!("{name} cannot be set"))?;
                let is_same = std::mem::discriminant(local) == std::mem::discriminant(&value);
                let is_text = matches!(
                    (&*local, &value),
                    (Value::NotSet | Value::Text(_), Value::NotSet | Value::Text(_))
                );
                if !is_same && !is_text {
                    return Err(format!("{name} is of another type than {value:?}"));
                }
                *local = value;
            }
        }
        Ok(())
    }

    fn value(&mut self, expression: &Expression) -> Result<Value, String> {
        Ok(match expression {
            Expression::Text(text) => Value::Text(text.clone()),
            Expression::Number(number) => Value::Number(*number),
            Expression::Bool(value) => Value::Bool(*value),
            Expression::Name(name) => self.named(name)?,
            Expression::Call(name, arguments) => self.call(name, arguments)?,
            Expression::Not(inner) => Value::Bool(!self.value(inner)?.holds()?),
            Expression::Both(a, b) => Value::Bool(self.value(a)?.holds()? && self.value(b)?.holds()?),
            Expression::Either(a, b) => Value::Bool(self.value(a)?.holds()? || self.value(b)?.holds()?),
            Expression::Compare(operator, a, b) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                Value::Bool(compare(operator, &a, &b)?)
            }
            Expression::Matches(subject, pattern, is_negated) => {
                let subject = self.value(subject)?;
                Value::Bool(self.matches(&subject, pattern)? != *is_negated)
            }
            Expression::Join(parts) => {
                let mut joined = String::new();
                for part in parts {
                    match self.value(part)? {
                        Value::Text(text) => joined.push_str(&text),
                        other => return Err(format!("{other:?} of {part:?} is joined to a STRING")),
                    }
                }
                Value::Text(joined)
            }
        })
    }

    fn matches(&mut self, subject: &Value, pattern: &str) -> Result<bool, String> {
        let found = Regex::new(pattern)
            .expect("it was checked")
            .captures(subject.text()?)
            .map(|found| found.iter().map(|group| group.map(|group| group.as_str().to_owned())).collect());
        let is_found = found.is_some();
        if let Some(groups) = found {
            self.groups = groups;
        }
        Ok(is_found)
    }

    fn named(&mut self, name: &str) -> Result<Value, String> {
        let text = |text: &str| Value::Text(text.to_owned());
        let or_not_set =
            |value: Option<&String>| value.map_or(Value::NotSet, |value| Value::Text(value.clone()));
        if let Some(header) = name.strip_prefix("req.http.") {
            return Ok(or_not_set(self.request.headers.get(&header.to_lowercase())));
        }
        if let Some(header) = name.strip_prefix("beresp.http.") {
            let headers = self.fetched.ok_or("there is no beresp outside vcl_fetch")?;
            return Ok(or_not_set(headers.get(&header.to_lowercase())));
        }
        if let Some(header) = name.strip_prefix("obj.http.") {
            let headers = &self.object()?.headers;
            return Ok(or_not_set(
                headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(header)).map(|(_, value)| value),
            ));
        }
        if let Some(group) = name.strip_prefix("re.group.") {
            let group: usize = group.parse().map_err(|_| format!("{name} is no group"))?;
            return Ok(or_not_set(self.groups.get(group).and_then(Option::as_ref)));
        }
        Ok(match name {
            "req.method" => text(&self.request.method),
            "req.url.path" => text(&self.request.path),
            "req.url.qs" => text(&self.request.query),
            "req.service_id" => text("service"),
            "now.sec" => text(&self.edge.now.to_string()),
            "fastly.ff.visits_this_service" => Value::Number(self.request.visits),
            "obj.status" => Value::Number(self.object()?.status),
            "obj.response" => Value::Text(self.object()?.reason.clone()),
            _ => {
                let local = self.locals.last().and_then(|locals| locals.get(name));
                local.cloned().ok_or_else(|| format!("unknown name {name}"))?
            }
        })
    }

    fn call(&mut self, name: &str, arguments: &[Expression]) -> Result<Value, String> {
        let mut values = Vec::new();
        for (at, argument) in arguments.iter().enumerate() {
            values.push(match argument {
                // Names of tables and of ciphers are not variables.
                Expression::Name(word) if name.starts_with("table.") && at == 0 => Value::Text(word.clone()),
                Expression::Name(word) if name == "crypto.decrypt_hex" && at < 3 => Value::Text(word.clone()),
                other => self.value(other)?,
            });
        }
        if !name.starts_with("table.") {
            return functions::call(name, &values);
        }
        let (table, key) = (values[0].text()?, values[1].text()?);
        let items = self.edge.program.tables.get(table).or_else(|| self.edge.dictionaries.get(table));
        let found = items.and_then(|items| items.get(key));
        Ok(match (name, found) {
            ("table.contains", found) => Value::Bool(found.is_some()),
            (_, Some(found)) => Value::Text(found.clone()),
            (_, None) => values.get(2).cloned().unwrap_or(Value::NotSet),
        })
    }
}

fn compare(operator: &str, a: &Value, b: &Value) -> Result<bool, String> {
    if let (Value::Number(a), Value::Number(b)) = (a, b) {
        return Ok(match operator {
            "==" => a == b,
            "!=" => a != b,
            "<=" => a <= b,
            ">=" => a >= b,
            "<" => a < b,
            _ => a > b,
        });
    }
    match (operator, a, b) {
        ("==", Value::Text(a), Value::Text(b)) => Ok(a == b),
        ("!=", Value::Text(a), Value::Text(b)) => Ok(a != b),
        _ => Err(format!("{a:?} {operator} {b:?}")),
    }
}
