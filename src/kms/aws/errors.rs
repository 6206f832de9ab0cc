//! What the SDK's errors mean to an operator.
//!
//! By their codes, not by their types: throttling and everything about credentials has no type, and the same code means
//! the same for every operation. The request's ID is in the text, because AWS's support asks for it.

use std::error::Error;

use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;

use super::super::{Cause, deepest};
use crate::rest::aws::{NoCredentials, no_credentials};

/// The longest text of AWS's that is passed on, in characters.
const MAX_SAID: usize = 600;

/// Why an operation failed, which `key` and `place` were to be part of.
pub(super) fn cause<E>(operation: &str, key: &str, place: &str, error: &SdkError<E>) -> Cause
where
    E: ProvideErrorMetadata + Error + 'static,
{
    if let Some(NoCredentials { may_come, why }) = no_credentials(error) {
        return if may_come { Cause::Unavailable(why) } else { Cause::Refused(why) };
    }
    let status = error.raw_response().map_or(0, |response| response.status().as_u16());
    match error {
        SdkError::ServiceError(_) => {
            let without = format!("status {status}");
            let code = error.code().unwrap_or(&without);
            let message = error.message().unwrap_or("no reason given");
            let request = error.request_id().unwrap_or("without ID");
            of_service(code, status, &said(&format!("{operation}: {code}: {message}"), request), key, place)
        }
        SdkError::ResponseError(_) if status < 500 => Cause::Refused(format!(
            "{operation}: {place} gives an answer that is not KMS's (status {status}); check kms.aws.endpoint"
        )),
        SdkError::ResponseError(_) => Cause::Unavailable(format!("{operation}: {place} answers {status}")),
        SdkError::ConstructionFailure(_) => Cause::Refused(format!("{operation}: {}", deepest(error))),
        _ => Cause::Unavailable(format!("{operation}: {place} cannot be reached: {}", deepest(error))),
    }
}

fn said(text: &str, request: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SAID).collect();
    format!("{text} (request {request})")
}

fn of_service(code: &str, status: u16, said: &str, key: &str, place: &str) -> Cause {
    let refused = |check: &str| Cause::Refused(format!("{said}; {check}"));
    match code {
        "InvalidCiphertextException" => Cause::Rejected(format!(
            "{said}; it was wrapped by another key or for another stream, or it was changed"
        )),
        "IncorrectKeyException" => Cause::Rejected(format!("{said}; another key wrapped it")),
        "ThrottlingException" | "Throttling" | "TooManyRequestsException" | "RequestLimitExceeded" => {
            Cause::Unavailable(format!("{said}; the account's quota of requests in {place} is used up"))
        }
        "KMSInternalException"
        | "DependencyTimeoutException"
        | "KeyUnavailableException"
        | "RequestTimeout"
        | "RequestTimeoutException"
        | "ServiceUnavailable" => Cause::Unavailable(said.to_owned()),
        "AccessDeniedException" | "AccessDenied" => refused(
            "check that the IAM policy and the key's own policy allow it, with this encryption context",
        ),
        "DisabledException" => refused(&format!("run: aws kms enable-key --key-id {key}")),
        "KMSInvalidStateException" => refused(&format!(
            "if it is pending deletion, run: aws kms cancel-key-deletion --key-id {key}, and enable it"
        )),
        "NotFoundException" => refused(&format!("check the key and its region: it is looked for in {place}")),
        "InvalidKeyUsageException" => refused("use a symmetric key that encrypts and decrypts"),
        "ExpiredTokenException" | "ExpiredToken" | "RequestExpired" => {
            refused("the credentials have expired: renew them")
        }
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidAccessKeyId"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => refused("check the credentials"),
        "InvalidSignatureException" | "SignatureDoesNotMatch" | "IncompleteSignature" => {
            refused("check the secret access key, the region and this machine's clock")
        }
        // Not KMS's own words: a gateway's, or a firewall's.
        _ if status == 401 || status == 403 => {
            refused("check the credentials, the IAM policy, and what stands between here and KMS")
        }
        _ if status >= 500 || status == 429 => Cause::Unavailable(said.to_owned()),
        _ => Cause::Refused(said.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &str, status: u16, expected: fn(&Cause) -> bool, with: &str) {
        let cause = of_service(code, status, &said("Decrypt: it says\nso", "r-1"), "alias/k", "eu-west-1");
        let text = cause.to_string();
        assert!(expected(&cause) && text.contains(with), "{code}: {cause:?}");
        assert!(text.contains("Decrypt: it says so (request r-1)"), "{text}");
    }

    #[test]
    fn codes_are_told_apart_and_say_what_to_check() {
        let unavailable: fn(&Cause) -> bool = |cause| matches!(cause, Cause::Unavailable(_));
        let refused: fn(&Cause) -> bool = |cause| matches!(cause, Cause::Refused(_));
        let rejected: fn(&Cause) -> bool = |cause| matches!(cause, Cause::Rejected(_));
        check("ThrottlingException", 400, unavailable, "quota");
        check("TooManyRequestsException", 400, unavailable, "quota");
        check("KeyUnavailableException", 500, unavailable, "");
        check("DependencyTimeoutException", 400, unavailable, "");
        check("KMSInternalException", 500, unavailable, "");
        check("status 502", 502, unavailable, "");
        check("status 429", 429, unavailable, "");
        check("status 403", 403, refused, "what stands between");
        check("AccessDeniedException", 400, refused, "IAM policy");
        check("DisabledException", 400, refused, "aws kms enable-key --key-id alias/k");
        check("KMSInvalidStateException", 400, refused, "cancel-key-deletion --key-id alias/k");
        check("NotFoundException", 400, refused, "eu-west-1");
        check("InvalidKeyUsageException", 400, refused, "symmetric");
        check("ExpiredTokenException", 400, refused, "expired");
        check("UnrecognizedClientException", 400, refused, "credentials");
        check("InvalidSignatureException", 400, refused, "clock");
        check("ValidationException", 400, refused, "");
        check("InvalidCiphertextException", 400, rejected, "changed");
        check("IncorrectKeyException", 400, rejected, "another key");
    }

    #[test]
    fn a_long_text_is_cut() {
        assert!(said(&"x".repeat(100_000), "r").len() < MAX_SAID + 20);
    }
}
