//! `api`: bodies of any endpoint to actions, and documents to the metadata service.

use bulle::api::http::{Method, Request};
use bulle::api::{endpoints, router};
use bulle::control::Action;
use devices::mmds::Mmds;

use super::input::Input;

/// Most bytes of a document.
const LIMIT: usize = 500;

/// Reads `data` as the body of the endpoint that its first byte names.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let number = usize::from(input.u8());
    let endpoints: Vec<_> = endpoints().collect();
    let (method, path) = endpoints[number % endpoints.len()];
    let method = match method {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        "PATCH" => Method::Patch,
        _ => Method::Delete,
    };
    let path = path.split('/').map(|part| match part.starts_with('{') {
        true => "a",
        false => part,
    });
    let request = Request {
        method,
        path: path.collect::<Vec<_>>().join("/"),
        query: String::from_utf8_lossy(input.0).into_owned(),
        body: input.0.to_vec(),
        keep_alive: true,
    };
    let route = router::find(&request).expect("an endpoint");
    match router::read(route, &request).map(|routed| routed.action) {
        Ok(Action::PutMmds(document) | Action::PatchMmds(document)) => documents(document),
        Ok(action) => assert_eq!(action, action.clone()),
        Err(error) => {
            let body = error.response().body.expect("an error says something");
            let _: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        }
    }
}

/// A document stays within its limit, and its own patch leaves it as it is without its nulls.
fn documents(document: serde_json::Value) {
    let mmds = Mmds::new(LIMIT);
    let size = document.to_string().len();
    assert_eq!(mmds.put(document.clone()).is_ok(), size <= LIMIT);
    let before = mmds.document();
    match mmds.patch(document) {
        Ok(()) => assert!(mmds.document().to_string().len() <= LIMIT),
        Err(_) => assert_eq!(mmds.document(), before),
    }
}
