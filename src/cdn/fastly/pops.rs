//! What every POP of Fastly answers for one URL: the check by the vendor itself, beside [`super::Edge::verify`], which
//! sees the POP next to the shield alone.
//!
//! For a person who wants to know, not for the engine: Fastly takes two hundred of these an hour.

use http::Method;
use serde::Deserialize;

use super::Fastly;
use super::dictionary::unreadable;
use crate::cdn::CdnError;
use crate::keys::KeyId;

/// A hundred POPs with all headers of their answers are far beyond what an answer else has.
const MAX_BYTES: usize = 4 << 20;

/// What one POP answers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PopAnswer {
    #[serde(default)]
    pub pop: String,
    #[serde(default)]
    pub server: String,
    /// MD5 of the body; `error-timeout-{pop}` from one that did not get it in time.
    #[serde(default)]
    pub hash: String,
}

/// How far the POPs agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PopTally {
    /// POPs that were asked.
    pub asked: usize,
    /// Those with the answer that most have.
    pub agreeing: usize,
    /// The others.
    pub others: Vec<PopAnswer>,
}

impl PopTally {
    fn of(answers: Vec<PopAnswer>) -> Self {
        let votes = |hash: &str| answers.iter().filter(|answer| answer.hash == hash).count();
        let most = answers.iter().map(|answer| &answer.hash).max_by_key(|hash| votes(hash)).cloned();
        let asked = answers.len();
        let others: Vec<_> =
            answers.into_iter().filter(|answer| Some(&answer.hash) != most.as_ref()).collect();
        Self { asked, agreeing: asked - others.len(), others }
    }
}

impl Fastly {
    /// What every POP answers for a path below the edge's URL.
    ///
    /// # Errors
    /// What Fastly does not answer, such as more than 200 of these in an hour.
    pub async fn edge_check(&self, path: &str) -> Result<Vec<PopAnswer>, CdnError> {
        let url = self.edge.url_of(path);
        let doing = format!("asking all POPs for {url}");
        let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("url", &url).finish();
        let request = self.api.request(Method::GET, &format!("content/edge_check?{query}"));
        let answer = self.api.call_for_much(&doing, request, MAX_BYTES).await?;
        answer.json().ok_or_else(|| unreadable(doing))
    }

    /// How many POPs have the same of a key: asks all of them for its check value.
    ///
    /// # Errors
    /// As [`Fastly::edge_check`].
    pub async fn key_at_pops(&self, key: KeyId) -> Result<PopTally, CdnError> {
        let path = format!("{}{key}/check", self.edge.settings().key_path);
        Ok(PopTally::of(self.edge_check(&path).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pops_that_answer_otherwise_are_named() {
        let answer = |pop: &str, hash: &str| PopAnswer {
            pop: pop.to_owned(),
            server: String::new(),
            hash: hash.to_owned(),
        };
        let tally =
            PopTally::of(vec![answer("FRA", "a"), answer("LHR", "error-timeout-LHR"), answer("SJC", "a")]);
        assert_eq!((tally.asked, tally.agreeing), (3, 2));
        assert_eq!(tally.others, [answer("LHR", "error-timeout-LHR")]);
        assert_eq!(PopTally::of(Vec::new()), PopTally { asked: 0, agreeing: 0, others: Vec::new() });
    }
}
