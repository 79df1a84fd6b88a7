//! `http`: bytes of a client to requests, in whatever pieces they come.

use bulle::api::http::{Parsed, parse};

/// Most bytes of a body.
const LIMIT: usize = 300;

/// Looks for requests in `data`, one behind the other.
pub fn run(data: &[u8]) {
    let mut rest = data;
    while let Ok(Parsed::Request(request, len)) = parse(rest, LIMIT) {
        assert!(len > 0 && len <= rest.len() && request.body.len() <= LIMIT);
        assert!(request.path.starts_with('/'));
        // What comes behind it changes nothing, and what is not all of it is none.
        let (own, behind) = rest.split_at(len);
        assert_eq!(parse(own, LIMIT), Ok(Parsed::Request(request, len)));
        for cut in [len - 1, len / 2, len / 3] {
            let part = parse(&own[..cut], LIMIT);
            assert!(matches!(part, Ok(Parsed::Incomplete { .. })), "{part:?}");
        }
        rest = behind;
    }
}
