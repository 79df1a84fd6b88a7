//! Requests by endpoint, under the names that Firecracker's metrics have.

use std::sync::atomic::{AtomicU64, Ordering};

use super::http::Method;
use super::routes::ROUTES;
use crate::telemetry::Figures;

/// What came over the API since it is served.
#[derive(Debug)]
pub struct Counts {
    /// Requests and failures of each of [`ROUTES`].
    routes: Box<[[AtomicU64; 2]]>,
    deprecated: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            routes: ROUTES.iter().map(|_| Default::default()).collect(),
            deprecated: AtomicU64::new(0),
        }
    }
}

impl Counts {
    /// Counts a request at the endpoint with this index in [`ROUTES`].
    pub(super) fn add(&self, route: usize, failed: bool, deprecated: bool) {
        let one = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        if let Some([count, fails]) = self.routes.get(route) {
            one(count);
            if failed {
                one(fails);
            }
        }
        if deprecated {
            one(&self.deprecated);
        }
    }

    /// As figures.
    pub fn figures(&self, figures: &mut Figures) {
        for (route, [count, fails]) in ROUTES.iter().zip(&self.routes) {
            let group = match route.method {
                Method::Get => "get_api_requests",
                Method::Put => "put_api_requests",
                Method::Patch => "patch_api_requests",
                Method::Delete => "delete_api_requests",
            };
            let name = name(route.path);
            figures.total(
                group,
                &format!("{name}_count"),
                count.load(Ordering::Relaxed),
            );
            figures.total(
                group,
                &format!("{name}_fails"),
                fails.load(Ordering::Relaxed),
            );
        }
        let deprecated = self.deprecated.load(Ordering::Relaxed);
        figures.total("deprecated_api", "deprecated_http_api_calls", deprecated);
    }
}

/// What the metrics call an endpoint.
fn name(path: &str) -> String {
    match path {
        "/" => "instance_info".to_owned(),
        "/version" => "vmm_version".to_owned(),
        "/machine-config" => "machine_cfg".to_owned(),
        "/cpu-config" => "cpu_cfg".to_owned(),
        "/drives/{drive_id}" => "drive".to_owned(),
        "/network-interfaces/{iface_id}" => "network".to_owned(),
        path => {
            let words = path
                .split('/')
                .filter(|s| !s.is_empty() && !s.starts_with('{'));
            words.collect::<Vec<_>>().join("_").replace('-', "_")
        }
    }
}
