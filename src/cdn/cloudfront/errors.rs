//! What the SDK's errors mean to an operator.
//!
//! By their codes, not by their types: throttling and everything about credentials has no type, and the same code means
//! the same for every operation. Which permission is missing is said by its name, because that is what is added to a
//! policy. The request's ID is in the text: AWS's support asks for it.

use std::error::Error;
use std::time::Duration;

use aws_sdk_cloudfront::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_cloudfront::operation::RequestId;

use super::super::{CdnError, CdnFault};
use crate::rest::aws::no_credentials;
use crate::rest::{deepest, said};

/// What is called: the IAM action and what it is done to, as errors name them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) action: &'static str,
    pub(super) resource: &'a str,
}

impl<'a> Call<'a> {
    pub(super) fn new(action: &'static str, resource: &'a str) -> Self {
        Self { action, resource }
    }

    /// What an answer without what was asked for is.
    pub(super) fn incomplete(&self) -> CdnError {
        let what = format!("{self}: an answer that is not CloudFront's; check the endpoint");
        CdnError::new(CdnFault::Invalid, what)
    }

    pub(super) fn failed<E>(&self, error: &SdkError<E>) -> CdnError
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        if let Some(none) = no_credentials(error) {
            let fault = if none.may_come { CdnFault::Away } else { CdnFault::Refused };
            return CdnError::new(fault, format!("{self}: {}", none.why));
        }
        let status = error.raw_response().map_or(0, |response| response.status().as_u16());
        match error {
            SdkError::ServiceError(_) => {
                let without = format!("status {status}");
                let code = error.code().unwrap_or(&without);
                let request = error.request_id().unwrap_or("without ID");
                let message = said(error.message().unwrap_or_default());
                let told = format!("{self}: {code}: {message} (request {request})");
                let later = error.raw_response().and_then(|response| response.headers().get("retry-after"));
                let later = later.and_then(|text| text.parse().ok()).map(Duration::from_secs);
                CdnError { retry_after: later, ..self.of_service(code, status, &told) }
            }
            SdkError::ResponseError(_) if (400..500).contains(&status) || status == 200 => self.incomplete(),
            SdkError::ConstructionFailure(_) => {
                CdnError::new(CdnFault::Invalid, format!("{self}: {}", deepest(error)))
            }
            SdkError::TimeoutError(_) => CdnError::new(
                CdnFault::Away,
                format!("{self}: no answer in time; is it reachable from here?"),
            ),
            _ => CdnError::new(CdnFault::Away, format!("{self}: no answer: {}", deepest(error))),
        }
    }

    fn of_service(&self, code: &str, status: u16, told: &str) -> CdnError {
        let error =
            |fault: CdnFault, cure: &str| CdnError::new(fault, format!("{told}{}{cure}", separator(cure)));
        let resource = self.resource;
        match code {
            "AccessDenied" | "AccessDeniedException" => error(
                CdnFault::Refused,
                &format!("the IAM policy of this shield does not allow {} on {resource}", self.action),
            ),
            "NoSuchDistribution"
            | "NoSuchResource"
            | "NoSuchPublicKey"
            | "NoSuchInvalidation"
            | "NoSuchFunctionExists"
            | "ResourceNotFoundException"
            | "EntityNotFound" => error(
                CdnFault::NotFound,
                &format!("the AWS account that these credentials are of has no {resource}"),
            ),
            "TooManyInvalidationsInProgress" => error(
                CdnFault::RateLimited,
                "so many are in progress as may be: 3,000 paths or tags, 15 with a wildcard",
            ),
            "Throttling" | "ThrottlingException" | "TooManyRequestsException" | "RequestLimitExceeded" => {
                error(CdnFault::RateLimited, "")
            }
            "ServiceQuotaExceededException" => {
                error(CdnFault::Invalid, "the store is full, or a value too long: 5 MB, 1 KB")
            }
            "TooManyPublicKeysInKeyGroup" => {
                error(CdnFault::Invalid, "take a key that nothing signs with out of the group")
            }
            "PublicKeyInUse" => {
                error(CdnFault::Invalid, "another key group has this key too: take it out there")
            }
            "ConflictException" | "PreconditionFailed" | "InvalidIfMatchVersion" => {
                error(CdnFault::Away, "somebody else changes it at the same time")
            }
            "ExpiredToken" | "ExpiredTokenException" | "RequestExpired" => {
                error(CdnFault::Refused, "the credentials have expired: renew them")
            }
            "InvalidClientTokenId"
            | "InvalidAccessKeyId"
            | "UnrecognizedClientException"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException" => error(CdnFault::Refused, "check the credentials"),
            "SignatureDoesNotMatch" | "InvalidSignatureException" | "IncompleteSignature" => error(
                CdnFault::Refused,
                "check the secret access key and this machine's clock, and for KeyValueStore that credentials come \
                 from STS of a region",
            ),
            _ if status == 401 || status == 403 => error(
                CdnFault::Refused,
                &format!("check the credentials, and that the IAM policy allows {}", self.action),
            ),
            _ if status == 429 => error(CdnFault::RateLimited, ""),
            _ if status >= 500 => error(CdnFault::Away, ""),
            _ => error(CdnFault::Invalid, ""),
        }
    }
}

impl std::fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.action, self.resource)
    }
}

fn separator(cure: &str) -> &'static str {
    if cure.is_empty() { "" } else { "; " }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &str, status: u16, fault: CdnFault, with: &str) {
        let call = Call::new("cloudfront:CreateInvalidation", "distribution E1");
        let error = call.of_service(code, status, "told");
        assert_eq!(error.fault, fault, "{code}: {error}");
        assert!(error.what.starts_with("told") && error.what.contains(with), "{code}: {error}");
    }

    #[test]
    fn codes_are_told_apart_and_say_what_to_do() {
        check(
            "AccessDenied",
            403,
            CdnFault::Refused,
            "allow cloudfront:CreateInvalidation on distribution E1",
        );
        check("NoSuchDistribution", 404, CdnFault::NotFound, "has no distribution E1");
        check("TooManyInvalidationsInProgress", 400, CdnFault::RateLimited, "15 with a wildcard");
        check("Throttling", 400, CdnFault::RateLimited, "");
        check("PreconditionFailed", 412, CdnFault::Away, "at the same time");
        check("ExpiredToken", 403, CdnFault::Refused, "renew");
        check("InvalidSignatureException", 403, CdnFault::Refused, "STS of a region");
        check("InvalidArgument", 400, CdnFault::Invalid, "");
        check("status 403", 403, CdnFault::Refused, "IAM policy");
        check("status 503", 503, CdnFault::Away, "");
        check("InternalServerException", 500, CdnFault::Away, "");
    }
}
