//! From text to a program: declarations of tables and subroutines, statements, expressions.

use std::collections::HashMap;

use super::functions;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Number(i64),
    Text(String),
    Symbol(&'static str),
}

/// Longest first.
const SYMBOLS: [&str; 22] = [
    "&&", "||", "==", "!=", "<=", ">=", "!~", "{", "}", "(", ")", ";", ",", ":", "=", "<", ">", "~", "!",
    "+", "/", "*",
];

#[derive(Debug, Clone)]
pub enum Expression {
    Text(String),
    Number(i64),
    Bool(bool),
    Name(String),
    Call(String, Vec<Expression>),
    Not(Box<Expression>),
    Both(Box<Expression>, Box<Expression>),
    Either(Box<Expression>, Box<Expression>),
    Compare(&'static str, Box<Expression>, Box<Expression>),
    /// The regular expression is a literal: VCL has no other.
    Matches(Box<Expression>, String, bool),
    Join(Vec<Expression>),
}

#[derive(Debug, Clone)]
pub enum Statement {
    Declare(String, String),
    Set(String, Expression),
    If(Vec<(Expression, Vec<Statement>)>, Vec<Statement>),
    Call(String),
    Error(i64, Expression),
    Return(String),
    Log(Expression),
    Synthetic(Expression, bool),
}

/// All of a service's VCL.
#[derive(Debug, Clone, Default)]
pub struct Program {
    pub tables: HashMap<String, HashMap<String, String>>,
    pub subroutines: HashMap<String, Vec<Statement>>,
}

impl Program {
    /// `files`: what stands at the top level; `hooks`: what stands in `vcl_recv`, `vcl_error` and `vcl_fetch`.
    /// `dictionaries`: tables that come from elsewhere.
    pub fn new(files: &[String], hooks: [&str; 3], dictionaries: &[String]) -> Result<Self, String> {
        let mut program = Program::default();
        for file in files {
            Parser::new(file)?.items(&mut program)?;
        }
        for (name, body) in ["vcl_recv", "vcl_error", "vcl_fetch"].into_iter().zip(hooks) {
            program.subroutines.insert(name.to_owned(), Parser::new(body)?.statements()?);
        }
        for body in program.subroutines.values() {
            program.check(body, dictionaries)?;
        }
        Ok(program)
    }

    fn check(&self, body: &[Statement], dictionaries: &[String]) -> Result<(), String> {
        let expression = |it: &Expression| self.check_expression(it, dictionaries);
        for statement in body {
            match statement {
                Statement::Call(name) if !self.subroutines.contains_key(name) => {
                    return Err(format!("no subroutine {name}"));
                }
                Statement::If(branches, otherwise) => {
                    for (condition, body) in branches {
                        expression(condition)?;
                        self.check(body, dictionaries)?;
                    }
                    self.check(otherwise, dictionaries)?;
                }
                Statement::Set(_, it) | Statement::Error(_, it) | Statement::Log(it) => expression(it)?,
                Statement::Synthetic(it, _) => expression(it)?,
                Statement::Call(_) | Statement::Declare(..) | Statement::Return(_) => {}
            }
        }
        Ok(())
    }

    fn check_expression(&self, it: &Expression, dictionaries: &[String]) -> Result<(), String> {
        let inner = |it: &Expression| self.check_expression(it, dictionaries);
        match it {
            Expression::Call(name, arguments) => {
                functions::check(name, arguments.len())?;
                if let (true, Some(Expression::Name(table))) = (name.starts_with("table."), arguments.first())
                    && !self.tables.contains_key(table)
                    && !dictionaries.contains(table)
                {
                    return Err(format!("no table {table}"));
                }
                arguments.iter().try_for_each(inner)
            }
            Expression::Join(parts) => parts.iter().try_for_each(inner),
            Expression::Not(it) => inner(it),
            Expression::Matches(it, pattern, _) => {
                regex::Regex::new(pattern).map_err(|error| error.to_string())?;
                inner(it)
            }
            Expression::Both(a, b) | Expression::Either(a, b) | Expression::Compare(_, a, b) => {
                inner(a).and_then(|()| inner(b))
            }
            _ => Ok(()),
        }
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn new(text: &str) -> Result<Self, String> {
        Ok(Self { tokens: tokens(text)?, at: 0 })
    }

    fn items(&mut self, program: &mut Program) -> Result<(), String> {
        while self.at < self.tokens.len() {
            match &*self.word()? {
                "table" => {
                    let name = self.word()?;
                    program.tables.insert(name, self.table()?);
                }
                "sub" => {
                    let name = self.word()?;
                    program.subroutines.insert(name, self.block()?);
                }
                other => return Err(format!("unknown declaration {other}")),
            }
        }
        Ok(())
    }

    fn table(&mut self) -> Result<HashMap<String, String>, String> {
        let mut items = HashMap::new();
        self.expect("{")?;
        while !self.take("}") {
            let key = self.text()?;
            self.expect(":")?;
            items.insert(key, self.text()?);
            self.expect(",")?;
        }
        Ok(items)
    }

    fn block(&mut self) -> Result<Vec<Statement>, String> {
        self.expect("{")?;
        let mut body = Vec::new();
        while !self.take("}") {
            body.push(self.statement()?);
        }
        Ok(body)
    }

    fn statements(&mut self) -> Result<Vec<Statement>, String> {
        let mut body = Vec::new();
        while self.at < self.tokens.len() {
            body.push(self.statement()?);
        }
        Ok(body)
    }

    fn statement(&mut self) -> Result<Statement, String> {
        let statement = match &*self.word()? {
            "if" => return self.condition(),
            "declare" => {
                if self.word()? != "local" {
                    return Err("`declare` without `local`".into());
                }
                let (name, kind) = (self.word()?, self.word()?);
                if !name.starts_with("var.") || !["STRING", "BOOL", "INTEGER"].contains(&&*kind) {
                    return Err(format!("bad declaration of {name}"));
                }
                Statement::Declare(name, kind)
            }
            "set" => {
                let name = self.word()?;
                self.expect("=")?;
                Statement::Set(name, self.expression()?)
            }
            "call" => Statement::Call(self.word()?),
            "error" => match self.next()? {
                Token::Number(status) => Statement::Error(status, self.expression()?),
                other => return Err(format!("error {other:?}")),
            },
            "return" => {
                self.expect("(")?;
                let state = self.word()?;
                self.expect(")")?;
                Statement::Return(state)
            }
            "log" => Statement::Log(self.expression()?),
            "synthetic" => Statement::Synthetic(self.expression()?, false),
            "synthetic.base64" => Statement::Synthetic(self.expression()?, true),
            other => return Err(format!("unknown statement {other}")),
        };
        self.expect(";")?;
        Ok(statement)
    }

    fn condition(&mut self) -> Result<Statement, String> {
        let mut branches = Vec::new();
        loop {
            self.expect("(")?;
            let condition = self.expression()?;
            self.expect(")")?;
            branches.push((condition, self.block()?));
            if !self.take_word("else") {
                return Ok(Statement::If(branches, Vec::new()));
            }
            if !self.take_word("if") {
                return Ok(Statement::If(branches, self.block()?));
            }
        }
    }

    fn expression(&mut self) -> Result<Expression, String> {
        let mut left = self.conjunction()?;
        while self.take("||") {
            left = Expression::Either(Box::new(left), Box::new(self.conjunction()?));
        }
        Ok(left)
    }

    fn conjunction(&mut self) -> Result<Expression, String> {
        let mut left = self.comparison()?;
        while self.take("&&") {
            left = Expression::Both(Box::new(left), Box::new(self.comparison()?));
        }
        Ok(left)
    }

    fn comparison(&mut self) -> Result<Expression, String> {
        let left = Box::new(self.join()?);
        for is_negated in [false, true] {
            if self.take(if is_negated { "!~" } else { "~" }) {
                return Ok(Expression::Matches(left, self.text()?, is_negated));
            }
        }
        for operator in ["==", "!=", "<=", ">=", "<", ">"] {
            if self.take(operator) {
                return Ok(Expression::Compare(operator, left, Box::new(self.join()?)));
            }
        }
        Ok(*left)
    }

    fn join(&mut self) -> Result<Expression, String> {
        let first = self.unary()?;
        let mut parts = vec![first];
        while self.take("+") {
            parts.push(self.unary()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expression::Join(parts) })
    }

    fn unary(&mut self) -> Result<Expression, String> {
        if self.take("!") {
            return Ok(Expression::Not(Box::new(self.unary()?)));
        }
        if self.take("(") {
            let inner = self.expression()?;
            self.expect(")")?;
            return Ok(inner);
        }
        match self.next()? {
            Token::Text(text) => Ok(Expression::Text(text)),
            Token::Number(number) => Ok(Expression::Number(number)),
            Token::Word(word) if word == "true" || word == "false" => Ok(Expression::Bool(word == "true")),
            Token::Word(word) if self.take("(") => {
                let mut arguments = Vec::new();
                while !self.take(")") {
                    arguments.push(self.expression()?);
                    if !self.take(",") {
                        self.expect(")")?;
                        break;
                    }
                }
                Ok(Expression::Call(word, arguments))
            }
            Token::Word(word) => Ok(Expression::Name(word)),
            other => Err(format!("{other:?} in an expression")),
        }
    }

    fn next(&mut self) -> Result<Token, String> {
        let token = self.tokens.get(self.at).cloned().ok_or("the end of the file came too early")?;
        self.at += 1;
        Ok(token)
    }

    fn take(&mut self, symbol: &str) -> bool {
        let is_next = matches!(self.tokens.get(self.at), Some(Token::Symbol(next)) if *next == symbol);
        self.at += usize::from(is_next);
        is_next
    }

    fn take_word(&mut self, word: &str) -> bool {
        let is_next = matches!(self.tokens.get(self.at), Some(Token::Word(next)) if next == word);
        self.at += usize::from(is_next);
        is_next
    }

    fn expect(&mut self, symbol: &str) -> Result<(), String> {
        if self.take(symbol) {
            return Ok(());
        }
        Err(format!("{symbol} is missing before {:?}", self.tokens.get(self.at)))
    }

    fn word(&mut self) -> Result<String, String> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => Err(format!("{other:?} where a name belongs")),
        }
    }

    fn text(&mut self) -> Result<String, String> {
        match self.next()? {
            Token::Text(text) => Ok(text),
            other => Err(format!("{other:?} where a string belongs")),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if rest.starts_with('#') || rest.starts_with("//") {
            rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
        } else if let Some(long) = rest.strip_prefix("{\"") {
            let (inner, behind) = long.split_once("\"}").ok_or("a long string has no end")?;
            tokens.push(Token::Text(inner.to_owned()));
            rest = behind;
        } else if let Some(short) = rest.strip_prefix('"') {
            let (inner, behind) = short.split_once('"').ok_or("a string has no end")?;
            if inner.contains(['%', '\n']) {
                return Err(format!("{inner:?}: Fastly reads % in some strings and not in others"));
            }
            tokens.push(Token::Text(inner.to_owned()));
            rest = behind;
        } else if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            tokens.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
        } else {
            let is_inside = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            let end = rest.find(|c| !is_inside(c)).unwrap_or(rest.len());
            let (word, behind) = rest.split_at(end);
            match word.parse() {
                _ if word.is_empty() => return Err(format!("{:?} is not of VCL", rest.chars().next())),
                Ok(number) => tokens.push(Token::Number(number)),
                Err(_) => tokens.push(Token::Word(word.to_owned())),
            }
            rest = behind;
        }
        rest = rest.trim_start();
    }
    Ok(tokens)
}
