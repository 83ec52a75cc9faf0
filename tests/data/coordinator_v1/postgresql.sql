CREATE TABLE public.coordinator_schema (
    version integer NOT NULL
);
CREATE SEQUENCE public.coordinator_schema_version_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.coordinator_schema_version_seq OWNED BY public.coordinator_schema.version;
CREATE TABLE public.pipeline_events (
    pipeline_id character varying(64) NOT NULL,
    sequence bigint NOT NULL,
    "time" bigint NOT NULL,
    state integer NOT NULL,
    stage integer NOT NULL,
    progress bytea,
    failure bytea
);
CREATE TABLE public.pipeline_jobs (
    pipeline_id character varying(64) NOT NULL,
    job_id character varying(128) NOT NULL,
    worker character varying(32) NOT NULL,
    run_id character varying(64) NOT NULL,
    sequence bigint NOT NULL
);
CREATE TABLE public.pipelines (
    pipeline_id character varying(64) NOT NULL,
    request_id character varying(128),
    spec bytea NOT NULL,
    state integer NOT NULL,
    stage integer NOT NULL,
    attempt integer NOT NULL,
    executor_id character varying(128) NOT NULL,
    last_sequence bigint NOT NULL,
    progress bytea,
    failure bytea,
    results bytea NOT NULL,
    finished_stages integer NOT NULL,
    create_time bigint NOT NULL,
    start_time bigint,
    end_time bigint
);
ALTER TABLE ONLY public.coordinator_schema ALTER COLUMN version SET DEFAULT nextval('public.coordinator_schema_version_seq'::regclass);
INSERT INTO public.coordinator_schema VALUES (1);
INSERT INTO public.pipeline_events VALUES ('20261124-155157-5e4294d3a5', 1, 1795535517483348, 1, 0, NULL, NULL);
INSERT INTO public.pipeline_events VALUES ('20261124-155157-5e4294d3a5', 2, 1795535517489346, 2, 1, NULL, NULL);
INSERT INTO public.pipeline_events VALUES ('20261124-155157-5e4294d3a5', 3, 1795535517498151, 2, 2, NULL, NULL);
INSERT INTO public.pipeline_events VALUES ('20261124-155157-5e4294d3a5', 4, 1795535517507131, 2, 2, '\x0a08747261696e696e6710071864', NULL);
INSERT INTO public.pipeline_jobs VALUES ('20261124-155157-5e4294d3a5', 'job-a', 'generator', 'run', 3);
INSERT INTO public.pipelines VALUES ('20261124-155157-5e4294d3a5', 'nightly', '\x0a5a0a490a477368613235363a616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161611a087265736e657432302a030320201204080410043a0474657374', 2, 2, 1, 'coordinator-under-test', 4, '\x0a08747261696e696e6710071864', NULL, '\x', 2, 1795535517480764, 1795535517489337, NULL);
SELECT pg_catalog.setval('public.coordinator_schema_version_seq', 1, false);
ALTER TABLE ONLY public.coordinator_schema
    ADD CONSTRAINT coordinator_schema_pkey PRIMARY KEY (version);
ALTER TABLE ONLY public.pipeline_events
    ADD CONSTRAINT pipeline_events_pkey PRIMARY KEY (pipeline_id, sequence);
ALTER TABLE ONLY public.pipeline_jobs
    ADD CONSTRAINT pipeline_jobs_pkey PRIMARY KEY (pipeline_id, job_id);
ALTER TABLE ONLY public.pipelines
    ADD CONSTRAINT pipelines_pkey PRIMARY KEY (pipeline_id);
ALTER TABLE ONLY public.pipelines
    ADD CONSTRAINT pipelines_request_id_key UNIQUE (request_id);
CREATE INDEX pipelines_by_state ON public.pipelines USING btree (state, create_time, pipeline_id);
CREATE INDEX pipelines_newest ON public.pipelines USING btree (create_time, pipeline_id);
ALTER TABLE ONLY public.pipeline_events
    ADD CONSTRAINT pipeline_events_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES public.pipelines(pipeline_id) ON DELETE CASCADE;
ALTER TABLE ONLY public.pipeline_jobs
    ADD CONSTRAINT pipeline_jobs_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES public.pipelines(pipeline_id) ON DELETE CASCADE;
