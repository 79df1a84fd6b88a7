//! `resources/api/openapi.yaml` against a running server: endpoints, fields of bodies, fields of answers.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

use crate::common;
use crate::mmds::{attach, network};
use crate::served::{Served, boot};

const METHODS: [&str; 4] = ["get", "put", "patch", "delete"];

pub type Names = BTreeSet<String>;

pub struct Description(Yaml);

pub struct Operation<'a> {
    pub method: String,
    pub path: &'a str,
    pub yaml: &'a Yaml,
}

impl Description {
    pub fn read() -> Self {
        let text = fs::read_to_string(common::tree().join("resources/api/openapi.yaml")).unwrap();
        let mut documents = YamlLoader::load_from_str(&text).unwrap();
        assert_eq!(documents.len(), 1);
        Self(documents.remove(0))
    }

    fn paths(&self) -> impl Iterator<Item = (&str, &Yaml)> {
        let paths = self.0["paths"].as_hash().unwrap().iter();
        paths.map(|(path, item)| (path.as_str().unwrap(), item))
    }

    pub fn operations(&self) -> impl Iterator<Item = Operation<'_>> {
        self.paths().flat_map(|(path, item)| {
            let there = METHODS
                .iter()
                .filter(|method| !item[**method].is_badvalue());
            there.map(move |method| Operation {
                method: method.to_uppercase(),
                path,
                yaml: &item[*method],
            })
        })
    }

    /// The codes of errors.
    pub fn codes(&self) -> Names {
        let code = &self.0["components"]["schemas"]["Error"]["properties"]["code"];
        let codes = code["enum"].as_vec().unwrap().iter();
        codes
            .map(|code| code.as_str().unwrap().to_owned())
            .collect()
    }

    /// Follows a reference, if it is one.
    fn resolve<'a>(&'a self, yaml: &'a Yaml) -> &'a Yaml {
        let Some(reference) = yaml["$ref"].as_str() else {
            return yaml;
        };
        let steps = reference.strip_prefix("#/").unwrap().split('/');
        let found = steps.fold(&self.0, |yaml, step| &yaml[step]);
        assert!(!found.is_badvalue(), "{reference} is nowhere");
        self.resolve(found)
    }

    /// The schema of what is described by a request body or a response.
    fn schema<'a>(&'a self, content: &'a Yaml) -> Option<&'a Yaml> {
        let content = self.resolve(content);
        let schema = &content["content"]["application/json"]["schema"];
        (!schema.is_badvalue()).then(|| self.resolve(schema))
    }

    /// Fields of a schema, and those that there have to be.
    fn fields(&self, schema: &Yaml) -> (Names, Names) {
        let parts = schema["allOf"].as_vec();
        let parts: Vec<_> = parts.map_or(vec![schema], |parts| parts.iter().collect());
        let parts = || parts.iter().map(|part| self.resolve(part));
        let text = |yaml: &Yaml| yaml.as_str().unwrap().to_owned();
        let properties = parts().filter_map(|part| part["properties"].as_hash());
        let all = properties.flat_map(|all| all.keys().map(text)).collect();
        let required = parts().filter_map(|part| part["required"].as_vec());
        (
            all,
            required.flat_map(|names| names.iter().map(text)).collect(),
        )
    }

    /// Other words for fields, which the command line's lists have.
    fn aliases(&self, schema: &Yaml) -> Names {
        let aliases = schema["x-aliases"].as_vec();
        let aliases = aliases.into_iter().flatten();
        aliases
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    }
}

/// A path with a name in it.
pub fn filled(path: &str) -> String {
    path.replace("{drive_id}", "a")
        .replace("{id}", "a")
        .replace("{iface_id}", "a")
}

/// The names in backquotes behind `expected` in a complaint about a field that there is not.
fn expected(text: &str) -> Names {
    assert!(text.contains("unknown field `__nobody__`"), "{text}");
    let (_, list) = text.split_once("`__nobody__`").unwrap();
    list.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

fn fault(vm: &mut Served, method: &str, path: &str, body: &str) -> String {
    let answer = vm.client.ask(method, &filled(path), body);
    let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    value["fault_message"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn each_endpoint_is_described_and_no_other() {
    let description = Description::read();
    let described: BTreeSet<_> = description
        .operations()
        .map(|operation| (operation.method.clone(), operation.path.to_owned()))
        .collect();
    let served = bulle::api::endpoints().map(|(method, path)| (method.to_owned(), path.to_owned()));
    assert_eq!(described, served.collect());
    let names: BTreeSet<_> = description
        .operations()
        .map(|operation| operation.yaml["operationId"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names.len(), described.len());
}

#[test]
fn described_methods_are_answered_and_others_are_not() {
    let description = Description::read();
    let mut vm = Served::new();
    for (path, item) in description.paths() {
        for method in METHODS {
            if item[method]["x-stream"].as_bool() == Some(true) {
                // The connection is the stream's from then on.
                continue;
            }
            let described = !item[method].is_badvalue();
            let body = if method == "get" { "" } else { "{" };
            let text = fault(&mut vm, &method.to_uppercase(), path, body);
            let unknown = text.starts_with("Invalid request method and/or path");
            // `PATCH /vm/config` is `PATCH /vm`: what comes behind is ignored, as Firecracker does.
            let shorter = described_above(&description, method, path);
            assert_eq!(unknown, !described && !shorter, "{method} {path}: {text}");
        }
    }
}

fn described_above(description: &Description, method: &str, path: &str) -> bool {
    let mut others = description.paths();
    others.any(|(other, item)| {
        other != "/" && path.starts_with(&format!("{other}/")) && !item[method].is_badvalue()
    })
}

#[test]
fn bodies_have_the_described_fields() {
    let description = Description::read();
    let mut vm = Served::new();
    let mut compared = 0;
    for operation in description.operations() {
        let Some(schema) = description.schema(&operation.yaml["requestBody"]) else {
            continue;
        };
        let (method, path) = (operation.method.as_str(), operation.path);
        let (mut fields, required) = description.fields(schema);
        let text = fault(&mut vm, method, path, "{}");
        match text.split_once("missing field `") {
            Some((_, rest)) => {
                let field = rest.split('`').next().unwrap();
                assert!(required.contains(field), "{method} {path}: {text}");
            }
            // A name that is not said is none.
            None if text.contains("does not match the id") => assert_eq!(required.len(), 1),
            None => assert!(required.is_empty(), "{method} {path}: {text}"),
        }
        if schema["additionalProperties"].as_bool() == Some(true) {
            continue;
        }
        let nobody = json!({ "__nobody__": 0 });
        let text = fault(&mut vm, method, path, &nobody.to_string());
        let properties = fields.clone();
        fields.extend(description.aliases(schema));
        assert_eq!(expected(&text), fields, "{method} {path}: {text}");
        compared += 1;
        for property in properties {
            let inner = description.resolve(&schema["properties"][property.as_str()]);
            if inner["additionalProperties"].as_bool() == Some(false) {
                let body = json!({ (property.as_str()): nobody }).to_string();
                let text = fault(&mut vm, method, path, &body);
                let (fields, _) = description.fields(inner);
                assert_eq!(
                    expected(&text),
                    fields,
                    "{method} {path}, {property}: {text}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 20, "{compared}");
}

#[test]
fn answers_have_the_described_fields() {
    let description = Description::read();
    let network = network();
    let mut vm = Served::new();
    let (disk, pmem) = (vm.file("disk", &[0; 4096]), vm.file("pmem", &[0; 2 << 20]));
    let path = |name: &str| vm.dir.path().join(name);
    let (socket, log, metrics) = (path("vsock"), path("log"), path("metrics"));
    vm.put("/boot-source", boot(&common::payload("serial_echo")))
        .done();
    let limits = json!({ "ops": { "size": 1000 }, "bandwidth": { "size": 1 << 20 } });
    vm.put(
        "/drives/a",
        json!({ "drive_id": "a", "path_on_host": disk, "rate_limiter": limits }),
    )
    .done();
    vm.put("/pmem/p", json!({ "id": "p", "path_on_host": pmem }))
        .done();
    attach(&mut vm, &network);
    vm.put("/mmds/config", json!({ "network_interfaces": ["eth0"] }))
        .done();
    vm.put("/mmds", json!({ "a": 1 })).done();
    vm.put("/entropy", json!({})).done();
    vm.put("/vsock", json!({ "guest_cid": 3, "uds_path": socket }))
        .done();
    let balloon = json!({
        "amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true,
    });
    vm.put("/balloon", balloon).done();
    vm.put("/hotplug/memory", json!({ "total_size_mib": 128 }))
        .done();
    vm.put(
        "/serial",
        json!({ "rate_limiter": { "size": 1 << 20, "refill_time": 1 } }),
    )
    .done();
    vm.put("/logger", json!({ "log_path": log, "level": "Info" }))
        .done();
    vm.put("/metrics", json!({ "metrics_path": metrics }))
        .done();
    let mut vm = vm.start().wait_for("ready");
    for operation in description.operations().filter(|o| o.method == "GET") {
        let answer = description.resolve(&operation.yaml["responses"]["200"]);
        let Some(schema) = description.schema(answer) else {
            let types = answer["content"].as_hash().unwrap();
            assert_eq!(types.len(), 1, "{}", operation.path);
            continue;
        };
        let value = vm.get(operation.path).value();
        compare(&description, schema, &value, operation.path);
    }
}

/// Every field is described, and those that have to be there are.
fn compare(description: &Description, schema: &Yaml, value: &Value, at: &str) {
    let Some(object) = value.as_object() else {
        if let Some(items) = value.as_array() {
            let schema = description.resolve(&schema["items"]);
            items
                .iter()
                .for_each(|item| compare(description, schema, item, at));
        }
        return;
    };
    if schema["additionalProperties"].as_bool() == Some(true) {
        return;
    }
    let (fields, required) = description.fields(schema);
    let there: Names = object.keys().cloned().collect();
    let more: Vec<_> = there.difference(&fields).collect();
    assert!(more.is_empty(), "{at} has {more:?}");
    let missing: Vec<_> = required.difference(&there).collect();
    assert!(missing.is_empty(), "{at} lacks {missing:?}");
    for (name, value) in object {
        let inner = description.resolve(&schema["properties"][name.as_str()]);
        compare(description, inner, value, &format!("{at}, {name}"));
    }
}
