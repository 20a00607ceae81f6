BEGIN TRANSACTION;
CREATE TABLE assignments (
	id VARCHAR NOT NULL, 
	run_id VARCHAR NOT NULL, 
	round INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	work VARCHAR(8) NOT NULL, 
	site VARCHAR NOT NULL, 
	model_digest VARCHAR NOT NULL, 
	model_bytes BIGINT NOT NULL, 
	state VARCHAR(9) NOT NULL, 
	reason TEXT NOT NULL, 
	examples BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	update_digest VARCHAR NOT NULL, 
	update_bytes BIGINT NOT NULL, 
	is_folded BOOLEAN NOT NULL, 
	bytes_down BIGINT NOT NULL, 
	bytes_up BIGINT NOT NULL, 
	metrics JSON NOT NULL, 
	phase_seconds JSON NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(run_id) REFERENCES runs (id)
);
INSERT INTO "assignments" VALUES('5c1f.2.1.train.a','5c1f',2,1,'TRAIN','a','blake3:02',5000000000,'DONE','',1099511627776,0,'blake3:03',77,0,0,0,'{"loss": 2.5}','{}');
CREATE TABLE rounds (
	run_id VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(11) NOT NULL, 
	base_digest VARCHAR NOT NULL, 
	started_at_s DOUBLE NOT NULL, 
	attempt INTEGER NOT NULL, 
	first_attempt INTEGER NOT NULL, 
	cohort JSON NOT NULL, 
	reason TEXT NOT NULL, 
	model_digest VARCHAR NOT NULL, 
	sum_digest VARCHAR NOT NULL, 
	model_bytes BIGINT NOT NULL, 
	delta_digest VARCHAR NOT NULL, 
	delta_bytes BIGINT NOT NULL, 
	metrics JSON NOT NULL, 
	ended_at_s DOUBLE NOT NULL, 
	PRIMARY KEY (run_id, number), 
	FOREIGN KEY(run_id) REFERENCES runs (id)
);
INSERT INTO "rounds" VALUES('5c1f',1,'FINISHED','blake3:01',2.5,1,1,'["a", "b"]','','blake3:02','',5000000000,'',0,'{"loss": 2.25, "perplexity": Infinity}',9.0);
INSERT INTO "rounds" VALUES('5c1f',2,'TRAINING','blake3:02',9.5,1,1,'["a", "b"]','','','',0,'',0,'{}',0.0);
CREATE TABLE runs (
	id VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	spec_json TEXT NOT NULL, 
	state VARCHAR(8) NOT NULL, 
	submitted_at_s DOUBLE NOT NULL, 
	assets JSON NOT NULL, 
	model_digest VARCHAR NOT NULL, 
	model_bytes BIGINT NOT NULL, 
	reason TEXT NOT NULL, 
	started_at_s DOUBLE NOT NULL, 
	ended_at_s DOUBLE NOT NULL, 
	paused_s DOUBLE NOT NULL, 
	rounds_done INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "runs" VALUES('5c1f','shakespeare','{"name":"shakespeare"}','RUNNING',1.5,'[{"name": "config.json", "digest": "blake3:aa", "size_bytes": 9}]','blake3:02',5000000000,'',0.0,0.0,0.0,1);
CREATE INDEX ix_assignments_run_id ON assignments (run_id);
COMMIT;
PRAGMA user_version = 3;
